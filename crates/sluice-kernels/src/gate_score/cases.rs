//! The case list of [`selftest`](crate::selftest).

use sluice_tensor::{DType, Tensor};
use sluice_testkit::Rng;

use super::{add_recency, bwd, fwd, naive};
use crate::selftest::Check;

const EPS: f32 = 1e-5;

/// `(B, T, M, Gs)`.
const CASES: &[(usize, usize, usize, usize)] = &[(1, 1, 1, 1), (2, 63, 17, 3), (1, 100, 64, 1), (3, 130, 576, 3), (1, 0, 8, 2)];

pub(crate) fn run(check: &mut Check<'_>) {
    for &(b, t, m, gs) in CASES {
        for format in check.activations() {
            run_case(check, (b, t, m, gs), format);
        }
    }
}

fn run_case(check: &mut Check<'_>, (b, t, m, gs): (usize, usize, usize, usize), format: DType) {
    if !check.case("gate_score", format!("[{b}, {t}, {m}] {format:?}, {gs} heads")) {
        return;
    }
    let mut rng = Rng::new(1);
    let (x, weight) = (rng.normal_tensor([b, t, m]), rng.normal_tensor([gs, m]));
    let (bias, recency, dscores) = (rng.normal_tensor([gs]), rng.normal_tensor([gs]), rng.normal_tensor([b, t, gs]));
    let positions: Vec<u32> = (0..t as u32).map(|i| i * 37 + 5).collect();
    let (x, x_there) = check.put_as(&x, format);
    let [weight_there, bias_there, recency_there, d_there] = [&weight, &bias, &recency, &dscores].map(|t| check.put(t));
    let scores = fwd(&x_there, &weight_there, &bias_there, &recency_there, &positions, EPS);
    let want = naive::fwd(x.f32(), weight.f32(), bias.f32(), recency.f32(), &positions, EPS);
    // The dot product of m terms has a rounding error of a few ulp of sqrt(m).
    let exact = 4e-6 * (m as f64).sqrt().max(4.0);
    check.compare("scores", &scores, &want, exact);
    let later = add_recency(&check.put(&dscores), recency.f32());
    let slope = |i: usize| recency.f32()[i % gs] as f64 * (i / gs % t) as f64 / 1024.0;
    let want: Vec<f64> = dscores.f32().iter().enumerate().map(|(i, &s)| s as f64 + slope(i)).collect();
    check.compare("scores with a slope", &later, &want, 1e-6);
    if t > 1 {
        let last = Tensor::from_vec(x.f32()[(t - 1) * m..t * m].to_vec(), [1, 1, m]);
        let alone = fwd(&check.put_as(&last, format).1, &weight_there, &bias_there, &recency_there, &positions[t - 1..], EPS);
        let among = scores.to(&sluice_tensor::Device::Cpu);
        let same = alone.to(&sluice_tensor::Device::Cpu).f32() == &among.f32()[(t - 1) * gs..t * gs];
        check.require("a row alone has the same bits", same);
    }
    let (dweight, dbias, drecency, dx) = bwd(&d_there, &x_there, &weight_there, &positions, EPS, true);
    let want = naive::bwd(dscores.f32(), x.f32(), weight.f32(), gs, &positions, EPS);
    let sums = 4e-7 * ((b * t) as f64).max(16.0);
    check.compare("dweight", &dweight, &want.0, sums);
    check.compare("dbias", &dbias, &want.1, sums);
    check.compare("drecency", &drecency, &want.2, sums);
    check.compare("dx", &dx.expect("asked for"), &want.3, exact);
    check.require("no dx unless wanted", bwd(&d_there, &x_there, &weight_there, &positions, EPS, false).3.is_none());
}
