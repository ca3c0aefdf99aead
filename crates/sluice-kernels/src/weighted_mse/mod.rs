//! Relative squared error of rows: `sum_i weights[i] |a_i - b_i|^2 / |b_i|^2`, `a` and `b` `[.., M]`.
//!
//! Rows of weight 0 are not looked at; a row of zeros in `b` counts with the denominator 1e-12.

pub(crate) mod cases;
mod cpu;
mod cuda;
pub mod naive;
#[cfg(test)]
mod tests;

use sluice_tensor::Tensor;

/// Denominators of relative errors stay above this; a row of zeros has no relative error.
const TINY: f32 = 1e-12;

/// `(loss [], factors [rows])`, both where `a` and `weights [rows]` are. The backward pass wants the second: `2 weights[i] / |b_i|^2`.
#[track_caller]
pub fn fwd(a: &Tensor, b: &Tensor, weights: &Tensor) -> (Tensor, Tensor) {
    assert!(
        a.shape() == b.shape() && weights.len() == a.n_rows(),
        "weighted_mse of {:?} and {:?} with {} weights",
        a.shape(),
        b.shape(),
        weights.len()
    );
    match a.gpu() {
        Some(gpu) => cuda::fwd(gpu, a, b, weights),
        None => cpu::fwd(a, b, weights.f32()),
    }
}

/// `da`, the shape of `a`, for the gradient `dy []` of the loss, which is not read by the host.
#[track_caller]
pub fn bwd(dy: &Tensor, a: &Tensor, b: &Tensor, factors: &Tensor) -> Tensor {
    assert!(
        dy.len() == 1 && a.shape() == b.shape() && factors.len() == a.n_rows(),
        "backward of weighted_mse with dy {:?}, a {:?}, b {:?}, factors {:?}",
        dy.shape(),
        a.shape(),
        b.shape(),
        factors.shape()
    );
    match a.gpu() {
        Some(gpu) => cuda::bwd(gpu, dy, a, b, factors),
        None => cpu::bwd(dy, a, b, factors),
    }
}
