//! Exact GELU: `x Phi(x)` with `Phi(x) = (1 + erf(x / sqrt 2)) / 2`, elementwise; for inference also with the bias of the layer before it.

pub(crate) mod cases;
mod cuda;
pub mod naive;
#[cfg(test)]
mod tests;

use std::f32::consts::FRAC_1_SQRT_2;

use sluice_tensor::Tensor;

use crate::row_chunks::{CHUNK, for_each_chunk, rows_per_chunk};
use crate::vector_math::{erf, exp, vectorised};

/// `gelu(x)`.
pub fn fwd(x: &Tensor) -> Tensor {
    if let Some(gpu) = x.gpu() {
        return cuda::fwd(gpu, x);
    }
    let xs = x.f32();
    let mut y = vec![0.0; xs.len()];
    for_each_chunk(&mut y, CHUNK, |i, y| fwd_slice(&xs[i * CHUNK..i * CHUNK + y.len()], y));
    Tensor::from_vec(y, x.shape())
}

/// `gelu(x + bias)`, `x [.., N]`, `bias [N]`, in the format of `x` and in its memory where nobody else looks at that.
#[track_caller]
pub fn fwd_biased(mut x: Tensor, bias: &Tensor) -> Tensor {
    let n = x.last_dim();
    assert_eq!(bias.shape(), [n], "bias of gelu of {:?}", x.shape());
    if let Some(gpu) = x.gpu().cloned() {
        cuda::fwd_biased(&gpu, &mut x, bias);
        return x;
    }
    let bias = bias.f32();
    for_each_chunk(x.f32_mut(), rows_per_chunk(n) * n.max(1), |_, rows| rows.chunks_exact_mut(n).for_each(|row| biased_row(row, bias)));
    x
}

/// `dx = dy gelu'(x)`.
#[track_caller]
pub fn bwd(dy: &Tensor, x: &Tensor) -> Tensor {
    assert_eq!(dy.shape(), x.shape(), "backward of gelu with dy {:?} and x {:?}", dy.shape(), x.shape());
    if let Some(gpu) = x.gpu() {
        return cuda::bwd(gpu, dy, x);
    }
    let (d, xs) = (dy.f32(), x.f32());
    let mut dx = vec![0.0; xs.len()];
    for_each_chunk(&mut dx, CHUNK, |i, dx| {
        let range = i * CHUNK..i * CHUNK + dx.len();
        bwd_slice(&d[range.clone()], &xs[range], dx);
    });
    Tensor::from_vec(dx, x.shape())
}

vectorised! {
    fn fwd_slice(x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = 0.5 * x * (1.0 + erf(x * FRAC_1_SQRT_2));
        }
    }
}

vectorised! {
    fn biased_row(row: &mut [f32], bias: &[f32]) {
        for (y, b) in row.iter_mut().zip(bias) {
            let x = *y + b;
            *y = 0.5 * x * (1.0 + erf(x * FRAC_1_SQRT_2));
        }
    }
}

vectorised! {
    fn bwd_slice(dy: &[f32], x: &[f32], dx: &mut [f32]) {
        /// `1 / sqrt(2 pi)`, the density of the standard normal at 0.
        const DENSITY_0: f32 = 0.398_942_3;
        for (dx, (d, x)) in dx.iter_mut().zip(dy.iter().zip(x)) {
            let cdf = 0.5 * (1.0 + erf(x * FRAC_1_SQRT_2));
            let density = DENSITY_0 * exp(-0.5 * x * x);
            *dx = d * x.mul_add(density, cdf);
        }
    }
}
