//! The case list of [`selftest`](crate::selftest).

use sluice_tensor::Tensor;
use sluice_testkit::Rng;

use super::{bwd, bwd_onto, fwd, naive};
use crate::selftest::Check;

const EPS: f32 = 1e-5;

/// `(rows, width)`.
const CASES: &[(usize, usize)] = &[(0, 63), (1, 1), (63, 100), (100, 63), (3, 1000), (1000, 33), (4, 0), (5, 576), (5000, 64)];

pub(crate) fn run(check: &mut Check<'_>) {
    for &(rows, m) in CASES {
        for with_weight in [false, true] {
            for format in check.activations() {
                let weighted = if with_weight { " weighted" } else { "" };
                if !check.case("rms_norm", format!("[{rows}, {m}]{weighted} dy {format:?}")) {
                    continue;
                }
                let mut rng = Rng::new(1);
                let (x, w, dy) = (rng.normal_tensor([rows, m]), rng.normal_tensor([m]), rng.normal_tensor([rows, m]));
                let before = rng.normal_tensor([rows, m]);
                let weight = with_weight.then_some(&w);
                let (dy, dy_there) = check.put_as(&dy, format);
                let [x_there, before_there] = [&x, &before].map(|t| check.put(t));
                let w_there = weight.map(|w| check.put(w));
                let (y, inv_rms) = fwd(&x_there, w_there.as_ref(), EPS);
                let (dx, dw) = bwd(&dy_there, &x_there, w_there.as_ref(), &inv_rms);
                let (sum, _) = bwd_onto(Some(before_there), &dy_there, &x_there, w_there.as_ref(), &inv_rms);
                let (want_y, want_inv) = naive::fwd(&x, weight, EPS);
                let (want_dx, want_dw) = naive::bwd(&dy, &x, weight, EPS);
                let want_sum: Vec<f64> = want_dx.iter().zip(before.f32()).map(|(dx, &b)| dx + b as f64).collect();
                check.compare("y", &y, &want_y, 2e-6 + check.rounding(y.dtype()));
                check.compare("1 / rms", &inv_rms, &want_inv, 2e-6);
                check.compare("dx", &dx, &want_dx, 1e-5);
                check.compare("dx added", &sum, &want_sum, 1e-5);
                let rounded: Tensor = sum.rounded();
                check.compare("dx added, in bf16", &rounded, &want_sum, 1e-5 + check.rounding(rounded.dtype()));
                check.require("dw is there if there is a weight", dw.is_some() == with_weight);
                if let Some(dw) = dw {
                    check.compare("dw", &dw, &want_dw, 2e-5 * (rows as f64 / 1000.0).max(1.0).sqrt());
                }
            }
        }
    }
}
