//! The specification, in f64: every value is projected.

use sluice_tensor::Tensor;

/// `[B, S, H]`.
pub fn key_weight(w_o: &Tensor, v: &Tensor) -> Vec<f64> {
    let ([m, inputs], [b, s, g, d]) = (w_o.dims(), v.dims());
    let n_heads = inputs / d;
    let mut weights = vec![];
    for row in 0..b * s {
        for h in 0..n_heads {
            let value = &v.f32()[(row * g + h / (n_heads / g)) * d..][..d];
            let written = |i: usize| -> f64 {
                let w = &w_o.f32()[i * inputs + h * d..][..d];
                w.iter().zip(value).map(|(&w, &v)| w as f64 * v as f64).sum()
            };
            weights.push((0..m).map(|i| written(i).powi(2)).sum());
        }
    }
    weights
}

/// `[B, T]`.
pub fn query_weight(h: &Tensor) -> Vec<f64> {
    h.f32().chunks(h.last_dim()).map(|row| 1.0 / row.iter().map(|&x| x as f64 * x as f64).sum::<f64>().max(1e-12)).collect()
}

/// Of every element.
pub fn label(mass: &Tensor) -> Vec<f64> {
    mass.f32().iter().map(|&m| 0.5 * (m as f64).max(1e-24).ln()).collect()
}
