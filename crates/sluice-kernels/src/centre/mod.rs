//! Columns of every sequence minus their mean over the sequence: `y_tj = x_tj - mean_t x_tj` on `[B, T, G]`. Its own backward.

pub(crate) mod cases;
mod cuda;
pub mod naive;

use sluice_tensor::Tensor;

/// `x [B, T, G]` without the mean of every sequence and column.
#[track_caller]
pub fn fwd(x: &Tensor) -> Tensor {
    let [_, t, g] = x.dims();
    if let Some(gpu) = x.gpu() {
        return cuda::fwd(gpu, x);
    }
    let mut y = x.clone();
    for sequence in y.f32_mut().chunks_exact_mut((t * g).max(1)) {
        for column in 0..g {
            let mean = sequence.iter().skip(column).step_by(g).map(|&x| x as f64).sum::<f64>() / t as f64;
            sequence.iter_mut().skip(column).step_by(g).for_each(|x| *x -= mean as f32);
        }
    }
    y
}
