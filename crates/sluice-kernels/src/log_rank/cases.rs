//! The case list of [`selftest`](crate::selftest).

use sluice_testkit::Rng;

use super::{minus_log_rank, naive};
use crate::selftest::Check;

/// `(n, G, whole numbers)`.
const CASES: &[(usize, usize, bool)] = &[(0, 2, false), (1, 1, false), (63, 3, false), (257, 2, true), (1000, 3, false), (2100, 1, true)];

pub(crate) fn run(check: &mut Check<'_>) {
    for &(n, g, ties) in CASES {
        if !check.case("log_rank", format!("[{n}, {g}]{}", if ties { ", ties" } else { "" })) {
            continue;
        }
        let mut y = Rng::new(n as u64).normal_tensor([n, g]);
        if ties {
            y.f32_mut().iter_mut().for_each(|y| *y = (*y * 3.0).round() + 0.0); // -0 + 0 is 0
        }
        check.compare("-ln(rank / n)", &minus_log_rank(&check.put(&y)), &naive::minus_log_rank(&y), 1e-6);
    }
}
