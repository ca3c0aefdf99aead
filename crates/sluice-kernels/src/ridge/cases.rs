//! The case list of [`selftest`](crate::selftest): two documents each, with the sums on the host in between for one of them.

use sluice_testkit::Rng;

use super::{RidgeSums, Sums, naive};
use crate::selftest::Check;

/// `(T, sampled, M, G)`.
const CASES: &[(usize, usize, usize, usize)] = &[(1, 1, 1, 1), (100, 63, 17, 3), (50, 0, 8, 2), (70, 70, 100, 2), (300, 257, 31, 5)];

const EPS: f32 = 1e-5;

pub(crate) fn run(check: &mut Check<'_>) {
    for &(t, n, m, g) in CASES {
        for moved in [false, true] {
            if !check.case("ridge", format!("{n} of {t} rows, [{m}] to {g}{}", if moved { ", by way of the host" } else { "" })) {
                continue;
            }
            let mut rng = Rng::new(t as u64);
            let (mut got, mut want) = (RidgeSums::new(m, g), Sums::zeros(m, g));
            for _ in 0..2 {
                let (x, y) = (rng.normal_tensor([1, t, m]), rng.normal_tensor([n, g]));
                let positions: Vec<u32> = (0..n).map(|i| (i * t / n) as u32).collect();
                got.add(&check.put(&x), EPS, &positions, &check.put(&y));
                naive::add(&mut want, &x, EPS, &positions, &y);
                if moved {
                    let sums = got.sums();
                    got = RidgeSums::new(m, g);
                    check.require("own sums fit", got.set(sums));
                }
            }
            let got = got.sums();
            let narrow = |sums: &[f64]| -> Vec<f32> { sums.iter().map(|&x| x as f32).collect() };
            let allowed = 2e-7 * (n as f64).max(16.0);
            check.compare_slice("x x^T", &narrow(&got.xx), &want.xx, allowed);
            check.compare_slice("x y^T", &narrow(&got.xy), &want.xy, allowed);
            check.compare_slice("y^2", &narrow(&got.yy), &want.yy, allowed);
            check.require("number of rows", got.samples() == (2 * n) as f64);
        }
    }
}
