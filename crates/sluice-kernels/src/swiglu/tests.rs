use sluice_testkit::{Rng, assert_close, check_gradient, probe_weights};

use super::*;

const SIZES: &[usize] = &[0, 1, 63, 100, 1000, 40_000];

fn to_f32(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

fn check(n: usize) {
    let mut rng = Rng::new(1);
    let (mut gate, up, dy) = (rng.normal_tensor([n]), rng.normal_tensor([n]), rng.normal_tensor([n]));
    // Gates up to +-30: both saturated ends.
    gate.f32_mut().iter_mut().enumerate().for_each(|(i, g)| *g *= 1.0 + (i % 10) as f32);
    let what = format!("[{n}]");
    assert_close(&what, fwd(&gate, &up).f32(), &to_f32(&naive::fwd(gate.f32(), up.f32())), 1e-6);
    let mut y = vec![f32::NAN; n];
    slice(gate.f32(), up.f32(), &mut y);
    assert_eq!(y, fwd(&gate, &up).f32(), "{what}");
    let (dgate, dup) = bwd(&dy, &gate, &up);
    let (want_dgate, want_dup) = naive::bwd(dy.f32(), gate.f32(), up.f32());
    assert_close(&what, dgate.f32(), &to_f32(&want_dgate), 1e-6);
    assert_close(&what, dup.f32(), &to_f32(&want_dup), 1e-6);
}

#[test]
fn agrees_with_the_naive_twin() {
    SIZES.iter().for_each(|&n| check(n));
}

#[test]
fn extreme_gates_stay_finite() {
    let gate = Tensor::from_vec(vec![-1e4, -100.0, -88.5, 0.0, 88.5, 1e4], [6]);
    let one = Tensor::full(1.0, [6]);
    assert_close("y", fwd(&gate, &one).f32(), &[0.0, 0.0, 0.0, 0.0, 88.5, 1e4], 1e-6);
    let (dgate, _) = bwd(&one, &gate, &one);
    assert_close("dgate", dgate.f32(), &[0.0, 0.0, 0.0, 0.5, 1.0, 1.0], 1e-6);
}

#[test]
fn gradients_match_finite_differences() {
    let mut rng = Rng::new(2);
    let (gate, up) = (rng.normal_tensor([5, 13]), rng.normal_tensor([5, 13]));
    let dy = Tensor::from_vec(probe_weights(65, 3), [5, 13]);
    let (dgate, dup) = bwd(&dy, &gate, &up);
    let loss = |g: &Tensor, u: &Tensor| naive::fwd(g.f32(), u.f32()).iter().zip(dy.f32()).map(|(y, &d)| y * d as f64).sum();
    check_gradient("dgate", &gate, &dgate, 1e-3, 1e-4, 30, |g| loss(g, &up));
    check_gradient("dup", &up, &dup, 1e-2, 1e-4, 30, |u| loss(&gate, u));
}
