use sluice_testkit::{Rng, assert_close};

use super::*;
use crate::row_chunks::on_one_and_three_threads;

const SETTINGS: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1 };

fn one() -> Tensor {
    Tensor::scalar(1.0)
}

#[test]
fn first_step_moves_by_the_learning_rate_against_the_gradient() {
    // With zero state both corrections cancel: m_hat / sqrt(v_hat) is the sign of the gradient.
    let mut param = Tensor::from_vec(vec![1.0, 1.0, 1.0], [3]);
    let grad = Tensor::from_vec(vec![5.0, -1e-3, 0.0], [3]);
    let (mut m, mut v) = (Tensor::zeros([3]), Tensor::zeros([3]));
    step(&mut param, &grad, &mut m, &mut v, &one(), AdamW { weight_decay: 0.0, ..SETTINGS });
    assert_close("param", param.f32(), &[0.99, 1.01, 1.0], 1e-6);
}

#[test]
fn decay_is_decoupled_from_the_gradient() {
    let mut param = Tensor::full(2.0, [1]);
    let (mut m, mut v) = (Tensor::zeros([1]), Tensor::zeros([1]));
    step(&mut param, &Tensor::zeros([1]), &mut m, &mut v, &one(), SETTINGS);
    assert_close("param", param.f32(), &[2.0 * (1.0 - 1e-2 * 0.1)], 1e-7);
    assert_eq!((m.item(), v.item()), (0.0, 0.0));
}

#[test]
fn scaling_in_the_step_is_scaling_before_it() {
    let run = |grad: Tensor, grad_scale| {
        let (mut param, mut m, mut v) = (Tensor::full(1.0, [101]), Tensor::zeros([101]), Tensor::zeros([101]));
        step(&mut param, &grad, &mut m, &mut v, &Tensor::scalar(grad_scale), SETTINGS);
        [param, m, v].map(Tensor::into_vec)
    };
    let grad = Rng::new(5).normal_tensor([101]);
    let mut scaled = grad.clone();
    scale_in_place(&mut scaled, 0.3);
    assert_eq!(run(grad, 0.3), run(scaled, 1.0));
}

#[test]
fn a_shared_parameter_is_copied_before_the_step() {
    let kept = Tensor::full(1.0, [4]);
    let mut param = kept.clone();
    step(&mut param, &Tensor::full(1.0, [4]), &mut Tensor::zeros([4]), &mut Tensor::zeros([4]), &one(), SETTINGS);
    assert_eq!(kept.f32(), [1.0; 4]);
    assert_ne!(param.f32(), kept.f32());
}

#[test]
fn global_norm_is_the_norm_of_everything_and_survives_large_values() {
    let grads = [Tensor::full(3.0, [CHUNK + 1]), Tensor::full(-4.0, [7])];
    let want = (9.0 * (CHUNK + 1) as f64 + 16.0 * 7.0).sqrt();
    let norm = |grads: &[&Tensor]| global_norm(grads, 1.0).0.item();
    assert!((norm(&[&grads[0], &grads[1]]) as f64 - want).abs() < 1e-7 * want);
    assert_eq!(norm(&[&Tensor::full(1e30, [4])]), 2.0 * 1e30f32);
    assert_eq!(norm(&[]), 0.0);
    let (one, three) = on_one_and_three_threads(|| norm(&[&Rng::new(9).normal_tensor([100_001])]));
    assert_eq!(one, three);
}

#[test]
fn scaling_touches_every_element() {
    let mut t = Rng::new(3).normal_tensor([2 * CHUNK + 3]);
    let want: Vec<f32> = t.f32().iter().map(|x| x * 0.25).collect();
    scale_in_place(&mut t, 0.25);
    assert_eq!(t.f32(), want);
}
