//! The case list of [`selftest`](crate::selftest).

use sluice_tensor::Tensor;
use sluice_testkit::Rng;

use super::{AdamW, global_norm, naive, raise_to_zero, scale_in_place, scale_in_place_by, step};
use crate::row_chunks::CHUNK;
use crate::selftest::Check;

const SETTINGS: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1 };

const GRAD_SCALE: f32 = 0.7;

/// `(elements, steps, tolerance)`: every step rounds once more.
const CASES: &[(usize, u64, f64)] =
    &[(0, 5, 2e-6), (1, 5, 2e-6), (63, 5, 2e-6), (100, 5, 2e-6), (1000, 5, 2e-6), (CHUNK + 5, 5, 2e-6), (3, 300, 2e-5)];

pub(crate) fn run(check: &mut Check<'_>) {
    for &(n, n_steps, allowed) in CASES {
        if !check.case("adamw", format!("[{n}], {n_steps} steps")) {
            continue;
        }
        let mut rng = Rng::new(1);
        let start = rng.normal_tensor([n]);
        let mut param = check.put(&start);
        let kept = param.clone();
        let grad_scale = check.put(&Tensor::scalar(GRAD_SCALE));
        let (mut m, mut v) = (Tensor::zeros_on(check.device(), [n]), Tensor::zeros_on(check.device(), [n]));
        let mut want: Vec<(f64, f64, f64)> = start.f32().iter().map(|&p| (p as f64, 0.0, 0.0)).collect();
        for number in 1..=n_steps {
            let grad = rng.normal_tensor([n]);
            let settings = AdamW { step: number, ..SETTINGS };
            step(&mut param, &check.put(&grad), &mut m, &mut v, &grad_scale, settings);
            for (want, &g) in want.iter_mut().zip(grad.f32()) {
                *want = naive::step(want.0, g as f64, want.1, want.2, GRAD_SCALE as f64, &settings);
            }
        }
        let column = |f: fn(&(f64, f64, f64)) -> f64| -> Vec<f64> { want.iter().map(f).collect() };
        check.compare("param", &param, &column(|w| w.0), allowed);
        check.compare("m", &m, &column(|w| w.1), allowed);
        check.compare("v", &v, &column(|w| w.2), allowed);
        let old: Vec<f64> = start.f32().iter().map(|&p| p as f64).collect();
        check.compare("a clone of param stays", &kept, &old, 0.0);
    }
    let (a, b) = (Rng::new(5).normal_tensor([100_001]), Rng::new(6).normal_tensor([7]));
    if !check.case("adamw", "norm and scale") {
        return;
    }
    let want = a.f32().iter().chain(b.f32()).map(|&x| x as f64 * x as f64).sum::<f64>().sqrt();
    for (clip, want_factor) in [(1.0, 1.0 / want), (1e4, 1.0)] {
        let (norm, factor) = global_norm(&[&check.put(&a), &check.put(&b)], clip);
        check.compare("global norm", &norm, &[want], 1e-7);
        check.compare("factor that clips", &factor, &[want_factor], 2e-7);
    }
    let (norm, factor) = global_norm(&[&check.put(&a), &check.put(&Tensor::scalar(f32::INFINITY))], 1.0);
    check.require("a norm that is not finite", norm.item() == f32::INFINITY && factor.item().is_nan());
    let (mut param, mut m, mut v) = (check.put(&b), check.put(&b), check.put(&b));
    step(&mut param, &check.put(&b), &mut m, &mut v, &factor, SETTINGS);
    let unchanged = b.f32().iter().map(|&x| x as f64).collect::<Vec<_>>();
    for (what, tensor) in [("param", param), ("m", m), ("v", v)] {
        check.compare(what, &tensor, &unchanged, 0.0);
    }
    let mut scaled = check.put(&a);
    scale_in_place(&mut scaled, 0.25);
    let want: Vec<f64> = a.f32().iter().map(|&x| x as f64 * 0.25).collect();
    check.compare("scaled", &scaled, &want, 0.0);
    for factor in [1.0, -0.5] {
        let mut scaled = check.put(&a);
        scale_in_place_by(&mut scaled, &check.put(&Tensor::scalar(factor)));
        let want: Vec<f64> = a.f32().iter().map(|&x| (x * factor) as f64).collect();
        check.compare("scaled by a tensor", &scaled, &want, 0.0);
    }
    let mut raised = check.put(&a);
    raise_to_zero(&mut raised);
    let want: Vec<f64> = a.f32().iter().map(|&x| if x > 0.0 { x as f64 } else { 0.0 }).collect();
    check.compare("raised to zero", &raised, &want, 0.0);
}
