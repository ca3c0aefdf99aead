//! Linear layer: `y = x w^T + bias`, `x [.., K]`, `w [N, K]`, `bias [N]`, `y [.., N]`.
//! `w` may be stored as bf16: rows are widened a block at a time, never the whole matrix. On a GPU `y` and `dx` have the format that its
//! precision gives to activations; `dw` and `db` are f32.

pub(crate) mod cases;
mod cpu;
mod cuda;
pub mod naive;
#[cfg(test)]
mod tests;

pub(crate) use cpu::{project, project_back, weight_gradient};
use sluice_tensor::Tensor;

use crate::add;
use crate::row_chunks::{for_each_chunk, rows_per_chunk, sum_over_rows};
use crate::vector_math;

/// `x w^T + bias`, `[.., N]`.
#[track_caller]
pub fn fwd(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let [n_out, n_in] = w.dims();
    assert_eq!(x.last_dim(), n_in, "linear of x {:?} and w {:?}", x.shape(), w.shape());
    if let Some(bias) = bias {
        assert_eq!(bias.shape(), [n_out], "bias of a linear layer with w {:?}", w.shape());
    }
    let n_rows = rows(x);
    if let Some(gpu) = x.gpu() {
        return cuda::fwd(gpu, x, n_rows, w, bias).reshape(with_last_dim(x, n_out));
    }
    let mut y = vec![0.0; n_rows * n_out];
    project(x.f32(), n_rows, w, &mut y);
    if let Some(bias) = bias.filter(|_| n_out > 0) {
        for_each_chunk(&mut y, rows_per_chunk(n_out) * n_out, |_, chunk| {
            chunk.chunks_exact_mut(n_out).for_each(|row| vector_math::add_assign(row, bias.f32()));
        });
    }
    Tensor::from_vec(y, with_last_dim(x, n_out))
}

/// [`fwd`] with a bias that a GPU adds in the format of its activations, where the product is stored: with bf16 the bias has 8 bits and the product may be
/// rounded before it is added, at a third of the memory traffic.
#[track_caller]
pub fn fwd_narrow_bias(x: &Tensor, w: &Tensor, bias: &Tensor) -> Tensor {
    let [n_out, n_in] = w.dims();
    match x.gpu() {
        Some(gpu) if n_in > 0 => {
            assert_eq!(x.last_dim(), n_in, "linear of x {:?} and w {:?}", x.shape(), w.shape());
            assert_eq!(bias.shape(), [n_out], "bias of a linear layer with w {:?}", w.shape());
            cuda::fwd_narrow_bias(gpu, x, rows(x), w, bias).reshape(with_last_dim(x, n_out))
        }
        _ => fwd(x, w, Some(bias)),
    }
}

/// [`fwd`] without a bias whose result is f32 whatever the precision.
#[track_caller]
pub fn fwd_f32(x: &Tensor, w: &Tensor) -> Tensor {
    let [n_out, n_in] = w.dims();
    let Some(gpu) = x.gpu() else { return fwd(x, w, None) };
    assert_eq!(x.last_dim(), n_in, "linear of x {:?} and w {:?}", x.shape(), w.shape());
    cuda::fwd_f32(gpu, x, rows(x), w).reshape(with_last_dim(x, n_out))
}

/// Gradient of the input: `dy w`, `[.., K]`.
#[track_caller]
pub fn bwd_input(dy: &Tensor, w: &Tensor) -> Tensor {
    bwd_input_onto(None, dy, w)
}

/// [`bwd_input`] added to the gradient that the input has so far, in place where nobody else looks at that.
#[track_caller]
pub fn bwd_input_onto(before: Option<Tensor>, dy: &Tensor, w: &Tensor) -> Tensor {
    let [n_out, n_in] = w.dims();
    assert_eq!(dy.last_dim(), n_out, "backward of linear with dy {:?} and w {:?}", dy.shape(), w.shape());
    let n_rows = rows(dy);
    if let Some(gpu) = dy.gpu() {
        return cuda::bwd_input(gpu, before, dy, n_rows, w).reshape(with_last_dim(dy, n_in));
    }
    let mut dx = vec![0.0; n_rows * n_in];
    project_back(dy.f32(), n_rows, w, &mut dx);
    add::onto(before, Tensor::from_vec(dx, with_last_dim(dy, n_in)))
}

/// Gradient of the weight: `dy^T x`, `[N, K]`.
#[track_caller]
pub fn bwd_weight(dy: &Tensor, x: &Tensor) -> Tensor {
    let (n_out, n_in, n_rows) = (dy.last_dim(), x.last_dim(), rows(dy));
    assert_eq!(n_rows, rows(x), "backward of linear with dy {:?} and x {:?}", dy.shape(), x.shape());
    if let Some(gpu) = dy.gpu() {
        return cuda::bwd_weight(gpu, dy, x, n_rows);
    }
    let mut dw = vec![0.0; n_out * n_in];
    weight_gradient(dy.f32(), x.f32(), n_rows, &mut dw, (n_out, n_in), false);
    Tensor::from_vec(dw, [n_out, n_in])
}

/// Gradient of the bias: the sum of `dy` over its rows, `[N]`.
pub fn bwd_bias(dy: &Tensor) -> Tensor {
    let n = dy.last_dim();
    if dy.gpu().is_some() {
        return cuda::bwd_bias(dy, rows(dy));
    }
    let dy_rows = dy.f32();
    let db = sum_over_rows(rows(dy), rows_per_chunk(n).max(64), n, |range, partial| {
        for i in range {
            vector_math::add_assign(partial, &dy_rows[i * n..(i + 1) * n]);
        }
    });
    Tensor::from_vec(db, [n])
}

/// Rows of `[.., K]`, also when `K` is 0.
fn rows(x: &Tensor) -> usize {
    x.shape().iter().rev().skip(1).product()
}

fn with_last_dim(x: &Tensor, n: usize) -> Vec<usize> {
    let mut shape = x.shape().to_vec();
    *shape.last_mut().expect("linear needs at least one axis") = n;
    shape
}
