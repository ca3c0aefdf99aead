use sluice_testkit::{Rng, check_gradient, probe_weights};

use super::*;

#[test]
fn naive_erf_has_the_tabulated_values() {
    // Abramowitz and Stegun, table 7.1.
    for (x, want) in [(0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0), (3.0, 0.999_977_909_5)] {
        assert!((naive::erf(x) - want).abs() < 1e-10, "erf({x}) = {}", naive::erf(x));
        assert!((naive::erf(-x) + want).abs() < 1e-10);
    }
}

#[test]
fn gradient_matches_finite_differences() {
    let x = Rng::new(2).normal_tensor([5, 13]);
    let dy = Tensor::from_vec(probe_weights(65, 3), [5, 13]);
    check_gradient("dx", &x, &bwd(&dy, &x), 1e-3, 1e-4, 65, |x| naive::fwd(x.f32()).iter().zip(dy.f32()).map(|(y, &d)| y * d as f64).sum());
}
