//! The case list of [`selftest`](crate::selftest).

use sluice_tensor::Tensor;
use sluice_testkit::Rng;

use super::{bwd, fwd, naive};
use crate::selftest::Check;

/// `(rows, width)`.
const CASES: &[(usize, usize)] = &[(0, 63), (1, 1), (63, 100), (100, 63), (3, 1000), (1000, 33), (4, 0), (5, 576)];

pub(crate) fn run(check: &mut Check<'_>) {
    for &(rows, m) in CASES {
        if !check.case("weighted_mse", format!("[{rows}, {m}]")) {
            continue;
        }
        let mut rng = Rng::new(m as u64);
        let (mut a, mut b) = (rng.normal_tensor([rows, m]), rng.normal_tensor([rows, m]));
        let weights: Vec<f32> = (0..a.n_rows()).map(|i| if i % 3 == 1 { 0.0 } else { 0.5 + rng.uniform() }).collect();
        // A row that does not count may hold anything, and one of zeros has a relative error too.
        if rows > 10 {
            a.f32_mut()[m..2 * m].fill(f32::NAN);
            b.f32_mut()[m..2 * m].fill(f32::NAN);
            b.f32_mut()[3 * m..4 * m].fill(0.0);
            a.f32_mut()[3 * m..4 * m].fill(1e-9);
        }
        let (a_there, b_there) = (check.put(&a), check.put(&b));
        let (loss, factors) = fwd(&a_there, &b_there, &check.put(&Tensor::from_vec(weights.clone(), [weights.len()])));
        let da = bwd(&check.put(&Tensor::scalar(-1.5)), &a_there, &b_there, &factors);
        let (want, want_da) = naive::loss(&a, &b, &weights);
        check.compare("loss", &loss, &[want], 2e-6);
        check.compare("da", &da, &want_da.iter().map(|d| d * -1.5).collect::<Vec<_>>(), 5e-6);
        check.require("loss has no axes", loss.shape().is_empty());
    }
}
