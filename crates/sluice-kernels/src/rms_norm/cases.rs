//! The case list of [`selftest`](crate::selftest).

use sluice_testkit::Rng;

use super::{bwd, fwd, naive};
use crate::selftest::Check;

const EPS: f32 = 1e-5;

/// `(rows, width)`.
const CASES: &[(usize, usize)] = &[(0, 63), (1, 1), (63, 100), (100, 63), (3, 1000), (1000, 33), (4, 0), (5, 576)];

pub(crate) fn run(check: &mut Check<'_>) {
    for &(rows, m) in CASES {
        for with_weight in [false, true] {
            check.case("rms_norm", format!("[{rows}, {m}]{}", if with_weight { " weighted" } else { "" }));
            let mut rng = Rng::new(1);
            let (x, w, dy) = (rng.normal_tensor([rows, m]), rng.normal_tensor([m]), rng.normal_tensor([rows, m]));
            let weight = with_weight.then_some(&w);
            let (x_there, dy_there) = (check.put(&x), check.put(&dy));
            let w_there = weight.map(|w| check.put(w));
            let (y, inv_rms) = fwd(&x_there, w_there.as_ref(), EPS);
            let (dx, dw) = bwd(&dy_there, &x_there, w_there.as_ref(), &inv_rms);
            let (want_y, want_inv) = naive::fwd(&x, weight, EPS);
            let (want_dx, want_dw) = naive::bwd(&dy, &x, weight, EPS);
            check.compare("y", &y, &want_y, 2e-6);
            check.compare("1 / rms", &inv_rms, &want_inv, 2e-6);
            check.compare("dx", &dx, &want_dx, 1e-5);
            check.require("dw is there if there is a weight", dw.is_some() == with_weight);
            if let Some(dw) = dw {
                check.compare("dw", &dw, &want_dw, 2e-5);
            }
        }
    }
}
