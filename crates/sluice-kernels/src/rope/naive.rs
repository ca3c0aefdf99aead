//! The specification: one complex product per pair, in f64.

use sluice_tensor::Tensor;

use super::RopeStyle;

/// `x` turned by `direction` times the angle of its position.
pub fn rotate(x: &Tensor, positions: &[u32], inv_freq: &[f32], style: RopeStyle, direction: f64) -> Vec<f64> {
    let [n_batch, n_queries, n_heads, head_dim] = x.dims();
    let mut y = vec![0.0; x.len()];
    for b in 0..n_batch {
        for t in 0..n_queries {
            for h in 0..n_heads {
                for i in 0..head_dim / 2 {
                    let head = ((b * n_queries + t) * n_heads + h) * head_dim;
                    let (p, q) = match style {
                        RopeStyle::Interleaved => (head + 2 * i, head + 2 * i + 1),
                        RopeStyle::HalfSplit => (head + i, head + i + head_dim / 2),
                    };
                    let (sin, cos) = (direction * positions[t] as f64 * inv_freq[i] as f64).sin_cos();
                    let (re, im) = (x.f32()[p] as f64, x.f32()[q] as f64);
                    y[p] = re * cos - im * sin;
                    y[q] = re * sin + im * cos;
                }
            }
        }
    }
    y
}
