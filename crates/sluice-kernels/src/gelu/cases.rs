//! The case list of [`selftest`](crate::selftest).

use sluice_testkit::Rng;

use super::{bwd, fwd, fwd_biased, naive};
use crate::selftest::Check;

const SIZES: &[usize] = &[0, 1, 63, 100, 1000, 40_000];

pub(crate) fn run(check: &mut Check<'_>) {
    for &n in SIZES {
        if !check.case("gelu", format!("[{n}]")) {
            continue;
        }
        let mut rng = Rng::new(1);
        let (mut x, dy) = (rng.normal_tensor([n]), rng.normal_tensor([n]));
        x.f32_mut().iter_mut().enumerate().for_each(|(i, x)| *x *= 1.0 + (i % 5) as f32);
        let x_there = check.put(&x);
        check.compare("y", &fwd(&x_there), &naive::fwd(x.f32()), 1e-6);
        check.compare("dx", &bwd(&check.put(&dy), &x_there), &naive::bwd(dy.f32(), x.f32()), 1e-6);
    }
    for (rows, n) in [(0, 8), (3, 63), (5, 1000), (37, 1024), (2, 1), (4, 0)] {
        for format in check.activations() {
            if !check.case("gelu", format!("[{rows}, {n}] {format:?} with a bias")) {
                continue;
            }
            let mut rng = Rng::new(3);
            let (mut x, bias) = (rng.normal_tensor([rows, n]), rng.normal_tensor([n]));
            x.f32_mut().iter_mut().enumerate().for_each(|(i, x)| *x *= 1.0 + (i % 5) as f32);
            let (x, x_there) = check.put_as(&x, format);
            let sum: Vec<f32> = x.f32().iter().enumerate().map(|(i, x)| x + bias.f32()[i % n]).collect();
            let kept = x_there.clone();
            let y = fwd_biased(x_there, &check.put(&bias));
            check.compare("y", &y, &naive::fwd(&sum), 1e-6 + check.rounding(y.dtype()));
            let before: Vec<f64> = x.f32().iter().map(|&x| x as f64).collect();
            check.compare("a clone of x stays", &kept, &before, 0.0);
        }
    }
}
