//! The specification, in f64; the bounds of the uniform numbers are f32.

use sluice_tensor::Tensor;

use super::{mix, uniform};

/// The scores with their noise.
pub fn add_noise(scores: &Tensor, seed: u64, stream: u64, scale: f32) -> Vec<f64> {
    let noise = |i: usize| {
        let u = uniform(mix(seed ^ i as u64, stream)).clamp(1e-6, 1.0 - 1e-6) as f64;
        -(-u.ln()).ln()
    };
    scores.f32().iter().enumerate().map(|(i, &score)| score as f64 + scale as f64 * noise(i)).collect()
}
