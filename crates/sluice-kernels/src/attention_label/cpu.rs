//! Two matrix products per head.

use sluice_tensor::Tensor;
use sluice_tensor::gemm::{Mat, gemm};

pub(super) fn key_weight(w_o: &Tensor, v: &Tensor, n_heads: usize) -> Tensor {
    let ([b, s, g, d], m) = (v.dims(), w_o.shape()[0]);
    let group = n_heads / g;
    let mut norms = vec![0.0; b * s * n_heads];
    let mut gram = vec![0.0; d * d];
    let mut projected = vec![0.0; b * s * d];
    for head in 0..n_heads {
        let slice = Mat::with_row_stride(&w_o.f32()[head * d..], m, d, n_heads * d); // [M, D]
        gemm(slice.t(), slice, &mut gram, d, false);
        let values = Mat::with_row_stride(&v.f32()[head / group * d..], b * s, d, g * d); // [B S, D]
        gemm(values, Mat::new(&gram, d, d), &mut projected, d, false);
        for row in 0..b * s {
            let value = &v.f32()[(row * g + head / group) * d..][..d];
            let square: f32 = value.iter().zip(&projected[row * d..][..d]).map(|(a, b)| a * b).sum();
            norms[row * n_heads + head] = square.max(0.0);
        }
    }
    Tensor::from_vec(norms, [b, s, n_heads])
}

pub(super) fn query_weight(h: &[f32], m: usize) -> Vec<f32> {
    h.chunks_exact(m).map(|row| 1.0 / row.iter().map(|x| x * x).sum::<f32>().max(1e-12)).collect()
}
