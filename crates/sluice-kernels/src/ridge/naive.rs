//! The specification, row by row in f64.

use sluice_tensor::Tensor;

use super::Sums;

/// Add the rows `positions` of `x [1, T, M]` with labels `y [n, G]`.
pub fn add(sums: &mut Sums, x: &Tensor, eps: f32, positions: &[u32], y: &Tensor) {
    let (m, g) = (x.last_dim(), y.last_dim());
    for (i, &position) in positions.iter().enumerate() {
        let input = &x.f32()[position as usize * m..][..m];
        let rms = (input.iter().map(|&v| v as f64 * v as f64).sum::<f64>() / m as f64 + eps as f64).sqrt();
        let row: Vec<f64> = input.iter().map(|&v| v as f64 / rms).chain([1.0]).collect();
        for (p, a) in row.iter().enumerate() {
            for (q, b) in row.iter().enumerate() {
                sums.xx[p * (m + 1) + q] += a * b;
            }
            for head in 0..g {
                sums.xy[p * g + head] += a * y.f32()[i * g + head] as f64;
            }
        }
        for head in 0..g {
            sums.yy[head] += (y.f32()[i * g + head] as f64).powi(2);
        }
    }
}
