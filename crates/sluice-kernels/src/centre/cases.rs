//! The case list of [`selftest`](crate::selftest).

use sluice_testkit::Rng;

use super::{fwd, naive};
use crate::selftest::Check;

/// Shape, and the length of each sequence.
const CASES: &[([usize; 3], &[usize])] =
    &[([1, 1, 1], &[1]), ([2, 100, 3], &[100, 100]), ([1, 1000, 8], &[1000]), ([3, 0, 2], &[0, 0, 0]), ([4, 300, 2], &[300, 1, 0, 257])];

pub(crate) fn run(check: &mut Check<'_>) {
    for &(shape, lens) in CASES {
        if !check.case("centre", format!("{shape:?}, lengths {lens:?}")) {
            continue;
        }
        let x = Rng::new(7).normal_tensor(shape);
        check.compare("y", &fwd(&check.put(&x), lens), &naive::fwd(&x, lens), 1e-6);
    }
}
