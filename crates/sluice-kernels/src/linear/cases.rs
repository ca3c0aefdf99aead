//! The case list of [`selftest`](crate::selftest).

use sluice_tensor::DType;
use sluice_testkit::Rng;

use super::{bwd_bias, bwd_input, bwd_input_onto, bwd_weight, fwd, fwd_f32, fwd_narrow_bias, naive};
use crate::selftest::Check;

struct Case {
    lead: &'static [usize],
    n_in: usize,
    n_out: usize,
}

const CASES: &[Case] = &[
    Case { lead: &[1], n_in: 1, n_out: 1 },
    Case { lead: &[2, 3], n_in: 63, n_out: 100 },
    Case { lead: &[100], n_in: 1000, n_out: 63 },
    Case { lead: &[1], n_in: 1000, n_out: 1000 },
    Case { lead: &[5], n_in: 64, n_out: 1 },
    Case { lead: &[8], n_in: 100, n_out: 333 },
    Case { lead: &[16], n_in: 100, n_out: 333 },
    Case { lead: &[17], n_in: 100, n_out: 333 },
    Case { lead: &[0], n_in: 63, n_out: 5 },
    Case { lead: &[4], n_in: 0, n_out: 5 },
    Case { lead: &[4], n_in: 5, n_out: 0 },
    // More than one block of widened bf16 rows on the CPU.
    Case { lead: &[7], n_in: 300, n_out: 2000 },
];

pub(crate) fn run(check: &mut Check<'_>) {
    for case in CASES {
        for dtype in [DType::F32, DType::Bf16] {
            for format in check.activations() {
                run_case(check, case, dtype, format);
            }
        }
    }
}

fn run_case(check: &mut Check<'_>, case: &Case, dtype: DType, format: DType) {
    if !check.case("linear", format!("{:?} {format:?} x [{}, {}] {dtype:?}", case.lead, case.n_out, case.n_in)) {
        return;
    }
    let mut rng = Rng::new(7);
    let shape = |last| [case.lead, &[last]].concat();
    let x = rng.normal_tensor(shape(case.n_in));
    let w = rng.normal_tensor([case.n_out, case.n_in]).to_dtype(dtype);
    let bias = rng.normal_tensor([case.n_out]);
    let dy = rng.normal_tensor(shape(case.n_out));
    // n roundings of partial sums of magnitude sqrt(n), in random directions.
    let exact = |n: usize| 2e-7 * n.max(16) as f64;
    let [(x, x_there), (dy, dy_there)] = [&x, &dy].map(|t| check.put_as(t, format));
    let [x_r, w_r, dy_r] = [&x, &w, &dy].map(|t| check.factor(t));
    let [w_there, bias_there] = [&w, &bias].map(|t| check.put(t));

    let y = fwd(&x_there, &w_there, Some(&bias_there));
    check.require("shape of y", y.shape() == shape(case.n_out));
    if case.n_in > 0 {
        for (output, y, bias) in [("y with bias", y, Some(&bias)), ("y", fwd(&x_there, &w_there, None), None)] {
            let want = naive::fwd(&x, &w, bias);
            let allowed = check.allowed(exact(case.n_in), &want, &naive::fwd(&x_r, &w_r, bias), 2.0);
            check.compare(output, &y, &want, allowed + check.rounding(y.dtype()));
        }
        let want = naive::fwd(&x, &w, None);
        let (with_bias, y) = (naive::fwd(&x, &w, Some(&bias)), fwd_narrow_bias(&x_there, &w_there, &bias_there));
        let allowed = check.allowed(exact(case.n_in), &with_bias, &naive::fwd(&x_r, &w_r, Some(&bias)), 2.0);
        // Product, bias and sum are rounded once each; two large numbers of opposite signs leave a small one.
        let parts =
            |(i, (product, sum)): (usize, (&f64, &f64))| (product.abs() + bias.f32()[i % case.n_out].abs() as f64) / sum.abs().max(1.0);
        let larger = want.iter().zip(&with_bias).enumerate().map(parts).fold(0.0, f64::max);
        check.compare("y with a narrow bias", &y, &with_bias, allowed + check.rounding(y.dtype()) / 2.0 * (1.0 + larger));
        let allowed = check.allowed(exact(case.n_in), &want, &naive::fwd(&x_r, &w_r, None), 2.0);
        check.compare("y in f32", &fwd_f32(&x_there, &w_there), &want, allowed);
    } else {
        let want: Vec<f64> = (0..y.len()).map(|i| bias.f32()[i % case.n_out] as f64).collect();
        // The GPU adds it by a product with ones, which rounds it in a mode with narrow factors.
        let rounded: Vec<f64> = (0..y.len()).map(|i| check.factor(&bias).f32()[i % case.n_out] as f64).collect();
        check.compare("y of nothing is the bias", &y, &want, check.allowed(0.0, &want, &rounded, 2.0) + check.rounding(y.dtype()));
    }
    let dx = bwd_input(&dy_there, &w_there);
    check.require("shape of dx", dx.shape() == x.shape());
    if case.n_out > 0 {
        let want = naive::bwd_input(&dy, &w);
        let allowed = check.allowed(exact(case.n_out), &want, &naive::bwd_input(&dy_r, &w_r), 3.0);
        check.compare("dx", &dx, &want, allowed + check.rounding(dx.dtype()));
        let (before, before_there) = check.put_as(&rng.normal_tensor(shape(case.n_in)), dx.dtype());
        let want: Vec<f64> = want.iter().zip(before.f32()).map(|(dx, &b)| dx + b as f64).collect();
        let sum = bwd_input_onto(Some(before_there), &dy_there, &w_there);
        check.compare("dx added", &sum, &want, allowed + 1e-6 + check.rounding(sum.dtype()));
    }
    let n_rows = case.lead.iter().product();
    let want = naive::bwd_weight(&dy, &x);
    let allowed = check.allowed(exact(n_rows), &want, &naive::bwd_weight(&dy_r, &x_r), 3.0);
    check.compare("dw", &bwd_weight(&dy_there, &x_there), &want, allowed);
    check.compare("db", &bwd_bias(&dy_there), &naive::bwd_bias(&dy), exact(n_rows));
}
