//! Gumbel noise on scores, which lets training look beyond the present choice: a hash of seed, stream and place, so it is the same
//! on every device and in every order of evaluation.

pub(crate) mod cases;
mod cuda;
pub mod naive;
#[cfg(test)]
mod tests;

use sluice_tensor::Tensor;

/// `scores[i] - scale ln(-ln u_i)`, `u_i` uniform from the hash of `seed ^ i` and `stream`, kept within `[1e-6, 1 - 1e-6]`.
pub fn add_noise(scores: &Tensor, seed: u64, stream: u64, scale: f32) -> Tensor {
    if let Some(gpu) = scores.gpu() {
        return cuda::add_noise(gpu, scores, seed, stream, scale);
    }
    let noisy = scores.f32().iter().enumerate().map(|(i, score)| {
        let u = uniform(mix(seed ^ i as u64, stream)).clamp(1e-6, 1.0 - 1e-6);
        score + -scale * (-u.ln()).ln()
    });
    Tensor::from_vec(noisy.collect(), scores.shape())
}

/// Hash of two numbers (SplitMix64 finaliser): the same on every machine and in every order of evaluation.
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_mul(0xC2B2_AE3D_27D4_EB4F).wrapping_add(0x1656_67B1_9E37_79F9);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Uniform in [0, 1) from a hash.
pub fn uniform(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1u64 << 24) as f32
}
