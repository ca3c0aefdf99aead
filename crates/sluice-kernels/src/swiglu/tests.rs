use sluice_testkit::{Rng, assert_close, check_gradient, probe_weights};

use super::*;

#[test]
fn a_slice_gets_the_bits_of_the_tensor() {
    for n in [0, 1, 63, 1000, 40_000] {
        let mut rng = Rng::new(1);
        let (gate, up) = (rng.normal_tensor([n]), rng.normal_tensor([n]));
        let mut y = vec![f32::NAN; n];
        slice(gate.f32(), up.f32(), &mut y);
        assert_eq!(y, fwd(&gate, &up).f32(), "[{n}]");
    }
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
