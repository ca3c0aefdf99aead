//! RMS normalisation of each row: `y = x / sqrt(mean(x^2) + eps) * weight`, `x [.., M]`, `weight [M]` or none.

pub(crate) mod cases;
mod cuda;
pub mod naive;
#[cfg(test)]
mod tests;

use sluice_tensor::Tensor;

use crate::add;
use crate::row_chunks::{for_each_chunk, for_each_chunk_pair, rows_per_chunk, sum_over_rows};
use crate::vector_math::{dot, dot_body, vectorised};

/// `(y [.., M], 1 / sqrt(mean(x^2) + eps) [rows])`; the backward pass wants the second.
#[track_caller]
pub fn fwd(x: &Tensor, weight: Option<&Tensor>, eps: f32) -> (Tensor, Tensor) {
    let (m, n_rows) = (x.last_dim(), x.n_rows());
    check_weight(x, weight);
    if let Some(gpu) = x.gpu() {
        return cuda::fwd(gpu, x, weight, eps);
    }
    let (xs, w) = (x.f32(), weight.map(Tensor::f32));
    let (mut y, mut inv_rms) = (vec![0.0; xs.len()], vec![0.0; n_rows]);
    let rows = rows_per_chunk(m);
    for_each_chunk_pair((&mut y, rows * m.max(1)), (&mut inv_rms, rows), |chunk, y, inv_rms| {
        let xs = &xs[chunk * rows * m..];
        for ((x, y), inv) in xs.chunks_exact(m).zip(y.chunks_exact_mut(m)).zip(inv_rms) {
            *inv = 1.0 / (dot(x, x) / m as f32 + eps).sqrt();
            match w {
                Some(w) => scale_by(x, w, *inv, y),
                None => scale_row(x, *inv, y),
            }
        }
    });
    (Tensor::from_vec(y, x.shape()), Tensor::from_vec(inv_rms, [n_rows]))
}

/// One row `y = rmsnorm(x) weight`, the bits of [`fwd`], into a slice that exists already.
#[track_caller]
pub fn row(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == y.len(), "rms_norm of {} numbers, {} weights, {}", x.len(), weight.len(), y.len());
    let inv_rms = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    scale_by(x, weight, inv_rms, y);
}

/// [`row`] in place: a head's query or key.
#[track_caller]
pub fn row_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    assert_eq!(x.len(), weight.len(), "rms_norm of {} numbers", x.len());
    let inv_rms = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    scale_in_place(x, weight, inv_rms);
}

/// `(dx, dweight)`; the second only if there is a weight.
///
/// With `n = x inv_rms` and `g = dy weight`: `dx = inv_rms (g - n mean(g n))`, `dweight = sum over rows of dy n`.
#[track_caller]
pub fn bwd(dy: &Tensor, x: &Tensor, weight: Option<&Tensor>, inv_rms: &Tensor) -> (Tensor, Option<Tensor>) {
    bwd_onto(None, dy, x, weight, inv_rms)
}

/// [`bwd`] with `dx` added to the gradient that `x` has so far, in place where nobody else looks at that.
#[track_caller]
pub fn bwd_onto(before: Option<Tensor>, dy: &Tensor, x: &Tensor, weight: Option<&Tensor>, inv_rms: &Tensor) -> (Tensor, Option<Tensor>) {
    let (m, n_rows) = (x.last_dim(), x.n_rows());
    check_weight(x, weight);
    assert_eq!(dy.shape(), x.shape(), "backward of rms_norm with dy {:?} and x {:?}", dy.shape(), x.shape());
    assert_eq!(inv_rms.len(), n_rows, "backward of rms_norm with inv_rms {:?} and x {:?}", inv_rms.shape(), x.shape());
    if let Some(gpu) = x.gpu() {
        return cuda::bwd(gpu, before, dy, x, weight, inv_rms);
    }
    let (d, xs, inv, w) = (dy.f32(), x.f32(), inv_rms.f32(), weight.map(Tensor::f32));
    let rows = rows_per_chunk(m);
    let mut dx = vec![0.0; xs.len()];
    for_each_chunk(&mut dx, rows * m.max(1), |chunk, dx| {
        for (i, dx) in dx.chunks_exact_mut(m).enumerate() {
            let row = chunk * rows + i;
            let range = row * m..(row + 1) * m;
            let (d, x) = (&d[range.clone()], &xs[range]);
            match w {
                Some(w) => scale_by(d, w, 1.0, dx),
                None => dx.copy_from_slice(d),
            }
            bwd_row(x, inv[row], dx);
        }
    });
    let dweight = weight.map(|w| {
        let sum = sum_over_rows(n_rows, rows.max(64), m, |range, partial| {
            for row in range {
                add_product(&d[row * m..(row + 1) * m], &xs[row * m..(row + 1) * m], inv[row], partial);
            }
        });
        Tensor::from_vec(sum, w.shape())
    });
    (add::onto(before, Tensor::from_vec(dx, x.shape())), dweight)
}

#[track_caller]
fn check_weight(x: &Tensor, weight: Option<&Tensor>) {
    if let Some(w) = weight {
        assert_eq!(w.shape(), [x.last_dim()], "rms_norm of x {:?} with weight {:?}", x.shape(), w.shape());
    }
}

vectorised! {
    fn scale_row(x: &[f32], a: f32, y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = x * a;
        }
    }
}

vectorised! {
    /// `y = x a w`.
    fn scale_by(x: &[f32], w: &[f32], a: f32, y: &mut [f32]) {
        for (y, (x, w)) in y.iter_mut().zip(x.iter().zip(w)) {
            *y = x * a * w;
        }
    }
}

vectorised! {
    /// `x = x a w`.
    fn scale_in_place(x: &mut [f32], w: &[f32], a: f32) {
        for (x, w) in x.iter_mut().zip(w) {
            *x = *x * a * w;
        }
    }
}

vectorised! {
    /// `sum += d x a`.
    fn add_product(d: &[f32], x: &[f32], a: f32, sum: &mut [f32]) {
        for (s, (d, x)) in sum.iter_mut().zip(d.iter().zip(x)) {
            *s = (x * a).mul_add(*d, *s);
        }
    }
}

vectorised! {
    /// `g` becomes `inv (g - x inv^2 mean(g x))`.
    fn bwd_row(x: &[f32], inv: f32, g: &mut [f32]) {
        let along = dot_body(g, x) / x.len() as f32 * inv * inv;
        for (g, x) in g.iter_mut().zip(x) {
            *g = inv * x.mul_add(-along, *g);
        }
    }
}
