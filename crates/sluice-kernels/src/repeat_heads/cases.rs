//! The case list of [`selftest`](crate::selftest). The twin is the repetition, and the sum, written out.

use sluice_testkit::Rng;

use super::{bwd, fwd};
use crate::selftest::Check;

/// `(B, T, G)`.
const CASES: &[(usize, usize, usize)] = &[(1, 1, 1), (2, 63, 3), (1, 0, 4), (1, 1000, 8)];

pub(crate) fn run(check: &mut Check<'_>) {
    for &(b, t, g) in CASES {
        if !check.case("repeat_heads", format!("[{b}, {t}, 1] to {g}")) {
            continue;
        }
        let mut rng = Rng::new(g as u64);
        let (x, dy) = (rng.normal_tensor([b, t, 1]), rng.normal_tensor([b, t, g]));
        let want: Vec<f64> = (0..b * t * g).map(|i| x.f32()[i / g] as f64).collect();
        let want_dx: Vec<f64> = (0..b * t).map(|i| (0..g).map(|head| dy.f32()[i * g + head] as f64).sum()).collect();
        let (y, dx) = (fwd(&check.put(&x), g), bwd(&check.put(&dy)));
        check.compare("y", &y, &want, 0.0);
        check.compare("dx", &dx, &want_dx, 1e-6);
        check.require("shapes", y.shape() == [b, t, g] && dx.shape() == [b, t, 1]);
    }
}
