//! The case list of [`selftest`](crate::selftest).

use sluice_tensor::Tensor;
use sluice_testkit::Rng;

use super::{bwd, fwd, fwd_residual, naive};
use crate::selftest::Check;

const EPS: f32 = 1e-5;

/// `(rows, width)`.
const CASES: &[(usize, usize)] = &[(0, 63), (1, 2), (63, 100), (100, 63), (3, 1000), (1000, 33), (4, 0), (9, 384)];

pub(crate) fn run(check: &mut Check<'_>) {
    for &(rows, m) in CASES {
        if !check.case("layer_norm", format!("[{rows}, {m}]")) {
            continue;
        }
        let mut rng = Rng::new(1);
        let (x, w, b) = (rng.normal_tensor([rows, m]), rng.normal_tensor([m]), rng.normal_tensor([m]));
        let dy = rng.normal_tensor([rows, m]);
        let [x_there, w_there, b_there, dy_there] = [&x, &w, &b, &dy].map(|t| check.put(t));
        let (y, mean, inv_std) = fwd(&x_there, &w_there, &b_there, EPS);
        let (dx, dw, db) = bwd(&dy_there, &x_there, &w_there, &mean, &inv_std);
        let (want_y, want_mean, want_inv) = naive::fwd(&x, &w, &b, EPS);
        let (want_dx, want_dw, want_db) = naive::bwd(&dy, &x, &w, EPS);
        check.compare("y", &y, &want_y, 5e-6);
        check.compare("mean", &mean, &want_mean, 1e-6);
        check.compare("1 / std", &inv_std, &want_inv, 5e-6);
        check.compare("dx", &dx, &want_dx, 1e-5);
        check.compare("dweight", &dw, &want_dw, 2e-5);
        check.compare("dbias", &db, &want_db, 2e-5);
    }
    for (rows, m) in [(0, 63), (1, 4), (63, 100), (5, 63), (9, 384), (33, 1024), (3, 1028), (2, 4096), (4, 0), (5000, 40), (2500, 63)] {
        for format in check.activations() {
            if !check.case("layer_norm", format!("[{rows}, {m}] {format:?} of a sum")) {
                continue;
            }
            let mut rng = Rng::new(2);
            let (x, r) = (rng.normal_tensor([rows, m]), rng.normal_tensor([rows, m]));
            let (added, w, b) = (rng.normal_tensor([m]), rng.normal_tensor([m]), rng.normal_tensor([m]));
            let ((x, x_there), (r, r_there)) = (check.put_as(&x, format), check.put_as(&r, format));
            let [added_there, w_there, b_there] = [&added, &w, &b].map(|t| check.put(t));
            let y = fwd_residual(&x_there, &added_there, &r_there, &w_there, &b_there, EPS);
            let sum = x.f32().iter().zip(r.f32()).enumerate().map(|(i, (x, r))| x + added.f32()[i % m] + r).collect();
            let (want, ..) = naive::fwd(&Tensor::from_vec(sum, [rows, m]), &w, &b, EPS);
            check.compare("y", &y, &want, 5e-6 + check.rounding(y.dtype()));
        }
    }
}
