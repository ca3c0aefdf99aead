//! The specification, in f64.

use sluice_tensor::Tensor;

/// The loss, and its gradient by `a`.
pub fn loss(a: &Tensor, b: &Tensor, weights: &[f32]) -> (f64, Vec<f64>) {
    let m = a.last_dim();
    let (mut loss, mut da) = (0.0, vec![0.0; a.len()]);
    for (i, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight != 0.0) {
        let row = i * m..(i + 1) * m;
        let norm = b.f32()[row.clone()].iter().map(|&b| b as f64 * b as f64).sum::<f64>().max(1e-12);
        for p in row {
            let off = a.f32()[p] as f64 - b.f32()[p] as f64;
            loss += weight as f64 * off * off / norm;
            da[p] = 2.0 * weight as f64 * off / norm;
        }
    }
    (loss, da)
}
