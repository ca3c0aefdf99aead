//! Two products of the gathered rows, in f32 within a document and f64 over documents.

use sluice_tensor::Tensor;
use sluice_tensor::gemm::{Mat, gemm};

use super::Sums;

pub(super) fn add(sums: &mut Sums, x: &Tensor, eps: f32, positions: &[u32], y: &Tensor) {
    let (m, g, n) = (x.last_dim(), y.last_dim(), positions.len());
    let mut rows = vec![1.0; n * (m + 1)]; // the last column stays 1: the intercept
    for (row, &position) in rows.chunks_exact_mut(m + 1).zip(positions) {
        let input = &x.f32()[position as usize * m..][..m];
        let inv_rms = (input.iter().map(|v| v * v).sum::<f32>() / m as f32 + eps).sqrt().recip();
        row[..m].iter_mut().zip(input).for_each(|(r, v)| *r = v * inv_rms);
    }
    let rows = Mat::new(&rows, n, m + 1);
    let mut xx = vec![0.0; (m + 1) * (m + 1)];
    let mut xy = vec![0.0; (m + 1) * g];
    gemm(rows.t(), rows, &mut xx, m + 1, false);
    gemm(rows.t(), Mat::new(y.f32(), n, g), &mut xy, g, false);
    sums.xx.iter_mut().zip(xx).for_each(|(sum, v)| *sum += v as f64);
    sums.xy.iter_mut().zip(xy).for_each(|(sum, v)| *sum += v as f64);
    for row in y.f32().chunks_exact(g) {
        sums.yy.iter_mut().zip(row).for_each(|(sum, v)| *sum += (v * v) as f64);
    }
}
