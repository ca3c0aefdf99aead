//! The case list of [`selftest`](crate::selftest).

use sluice_testkit::Rng;

use super::{bwd, fwd, naive};
use crate::selftest::Check;

const SIZES: &[usize] = &[0, 1, 63, 100, 1000, 40_000];

pub(crate) fn run(check: &mut Check<'_>) {
    for &n in SIZES {
        check.case("gelu", format!("[{n}]"));
        let mut rng = Rng::new(1);
        let (mut x, dy) = (rng.normal_tensor([n]), rng.normal_tensor([n]));
        x.f32_mut().iter_mut().enumerate().for_each(|(i, x)| *x *= 1.0 + (i % 5) as f32);
        let x_there = check.put(&x);
        check.compare("y", &fwd(&x_there), &naive::fwd(x.f32()), 1e-6);
        check.compare("dx", &bwd(&check.put(&dy), &x_there), &naive::bwd(dy.f32(), x.f32()), 1e-6);
    }
}
