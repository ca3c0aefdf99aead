//! The case list of [`selftest`](crate::selftest).

use sluice_testkit::Rng;

use super::{fwd, naive};
use crate::selftest::Check;

const SHAPES: &[[usize; 3]] = &[[1, 1, 1], [2, 100, 3], [1, 1000, 8], [3, 0, 2]];

pub(crate) fn run(check: &mut Check<'_>) {
    for &shape in SHAPES {
        check.case("centre", format!("{shape:?}"));
        let x = Rng::new(7).normal_tensor(shape);
        check.compare("y", &fwd(&check.put(&x)), &naive::fwd(&x), 1e-6);
    }
}
