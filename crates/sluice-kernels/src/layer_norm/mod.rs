//! Layer normalisation of each row: `y = (x - mean) / sqrt(var + eps) * weight + bias`, `x [.., M]`,
//! `var` the biased variance.

pub(crate) mod cases;
mod cuda;
pub mod naive;
#[cfg(test)]
mod tests;

use sluice_tensor::Tensor;

use crate::row_chunks::{for_each_chunk, for_each_chunk_pair, rows_per_chunk, sum_over_rows};
use crate::vector_math::{LANES, add_assign, add_lanes, sum, vectorised};

/// `(y [.., M], mean [rows], 1 / sqrt(var + eps) [rows])`.
#[track_caller]
pub fn fwd(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> (Tensor, Tensor, Tensor) {
    let (m, n_rows) = (x.last_dim(), x.n_rows());
    assert!(
        weight.shape() == [m] && bias.shape() == [m],
        "layer_norm of x {:?} with weight {:?} and bias {:?}",
        x.shape(),
        weight.shape(),
        bias.shape()
    );
    if let Some(gpu) = x.gpu() {
        return cuda::fwd(gpu, x, weight, bias, eps);
    }
    let (xs, w, b) = (x.f32(), weight.f32(), bias.f32());
    let (mut y, mut moments) = (vec![0.0; xs.len()], vec![(0.0, 0.0); n_rows]);
    let rows = rows_per_chunk(m);
    for_each_chunk_pair((&mut y, rows * m.max(1)), (&mut moments, rows), |chunk, y, moments| {
        let xs = &xs[chunk * rows * m..];
        for ((x, y), (mean, inv_std)) in xs.chunks_exact(m).zip(y.chunks_exact_mut(m)).zip(moments) {
            *mean = sum(x) / m as f32;
            *inv_std = 1.0 / (sum_of_squares(x, *mean) / m as f32 + eps).sqrt();
            normalise(x, *mean, *inv_std, w, b, y);
        }
    });
    let (mean, inv_std) = moments.into_iter().unzip();
    (Tensor::from_vec(y, x.shape()), Tensor::from_vec(mean, [n_rows]), Tensor::from_vec(inv_std, [n_rows]))
}

/// [`fwd`] of `x + added + residual`, for inference: `x`, `residual [.., M]`, `added [M]` (the bias of the layer that made `x`). On a GPU `x` and
/// `residual` have one format, in which the result is.
#[track_caller]
pub fn fwd_residual(x: &Tensor, added: &Tensor, residual: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Tensor {
    let m = x.last_dim();
    assert!(
        x.shape() == residual.shape() && [added, weight, bias].iter().all(|t| t.shape() == [m]),
        "layer_norm of x {:?} and residual {:?} with a vector {:?}, weight {:?} and bias {:?}",
        x.shape(),
        residual.shape(),
        added.shape(),
        weight.shape(),
        bias.shape()
    );
    if let Some(gpu) = x.gpu() {
        return cuda::fwd_residual(gpu, x, added, residual, weight, bias, eps);
    }
    let (xs, rs, added, w, b) = (x.f32(), residual.f32(), added.f32(), weight.f32(), bias.f32());
    let mut y = vec![0.0; xs.len()];
    let rows = rows_per_chunk(m);
    for_each_chunk(&mut y, rows * m.max(1), |chunk, y| {
        let mut sum_of_three = vec![0.0; m];
        for (i, y) in y.chunks_exact_mut(m).enumerate() {
            let row = (chunk * rows + i) * m..(chunk * rows + i + 1) * m;
            sum_of_three.copy_from_slice(&xs[row.clone()]);
            add_assign(&mut sum_of_three, added);
            add_assign(&mut sum_of_three, &rs[row]);
            let mean = sum(&sum_of_three) / m as f32;
            let inv_std = 1.0 / (sum_of_squares(&sum_of_three, mean) / m as f32 + eps).sqrt();
            normalise(&sum_of_three, mean, inv_std, w, b, y);
        }
    });
    Tensor::from_vec(y, x.shape())
}

/// `(dx, dweight, dbias)`.
///
/// With `n = (x - mean) inv_std` and `g = dy weight`: `dx = inv_std (g - mean(g) - n mean(g n))`.
#[track_caller]
pub fn bwd(dy: &Tensor, x: &Tensor, weight: &Tensor, mean: &Tensor, inv_std: &Tensor) -> (Tensor, Tensor, Tensor) {
    let (m, n_rows) = (x.last_dim(), x.n_rows());
    assert!(
        dy.shape() == x.shape() && weight.shape() == [m] && mean.len() == n_rows && inv_std.len() == n_rows,
        "backward of layer_norm with dy {:?}, x {:?}, weight {:?}, mean {:?}, inv_std {:?}",
        dy.shape(),
        x.shape(),
        weight.shape(),
        mean.shape(),
        inv_std.shape()
    );
    if let Some(gpu) = x.gpu() {
        return cuda::bwd(gpu, dy, x, weight, mean, inv_std);
    }
    let (d, xs, w, mean, inv_std) = (dy.f32(), x.f32(), weight.f32(), mean.f32(), inv_std.f32());
    let row = |i: usize| i * m..(i + 1) * m;
    let rows = rows_per_chunk(m);
    let mut dx = vec![0.0; xs.len()];
    for_each_chunk(&mut dx, rows * m.max(1), |chunk, dx| {
        for (i, dx) in dx.chunks_exact_mut(m).enumerate() {
            let i = chunk * rows + i;
            bwd_row(&d[row(i)], &xs[row(i)], w, mean[i], inv_std[i], dx);
        }
    });
    let mut both = sum_over_rows(n_rows, rows.max(64), 2 * m, |range, partial| {
        let (dw, db) = partial.split_at_mut(m);
        for i in range {
            add_parameter_gradients(&d[row(i)], &xs[row(i)], mean[i], inv_std[i], dw, db);
        }
    });
    let db = both.split_off(m);
    (Tensor::from_vec(dx, x.shape()), Tensor::from_vec(both, [m]), Tensor::from_vec(db, [m]))
}

vectorised! {
    fn sum_of_squares(x: &[f32], mean: f32) -> f32 {
        let mut acc = [0.0f32; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for x in chunks {
            for i in 0..LANES {
                let c = x[i] - mean;
                acc[i] = c.mul_add(c, acc[i]);
            }
        }
        for (a, x) in acc.iter_mut().zip(rest) {
            *a = (x - mean).mul_add(x - mean, *a);
        }
        add_lanes(acc)
    }
}

vectorised! {
    fn normalise(x: &[f32], mean: f32, inv_std: f32, w: &[f32], b: &[f32], y: &mut [f32]) {
        let n = y.len();
        let (x, w, b) = (&x[..n], &w[..n], &b[..n]);
        for i in 0..n {
            y[i] = ((x[i] - mean) * inv_std).mul_add(w[i], b[i]);
        }
    }
}

vectorised! {
    fn bwd_row(d: &[f32], x: &[f32], w: &[f32], mean: f32, inv_std: f32, dx: &mut [f32]) {
        let n = dx.len();
        let (d, x, w) = (&d[..n], &x[..n], &w[..n]);
        let (mut g_sum, mut gn_sum) = ([0.0f32; LANES], [0.0f32; LANES]);
        let whole = n - n % LANES;
        for at in (0..whole).step_by(LANES) {
            for i in 0..LANES {
                let g = d[at + i] * w[at + i];
                g_sum[i] += g;
                gn_sum[i] = ((x[at + i] - mean) * inv_std).mul_add(g, gn_sum[i]);
            }
        }
        for at in whole..n {
            let g = d[at] * w[at];
            g_sum[at - whole] += g;
            gn_sum[at - whole] = ((x[at] - mean) * inv_std).mul_add(g, gn_sum[at - whole]);
        }
        let (g_mean, gn_mean) = (add_lanes(g_sum) / n as f32, add_lanes(gn_sum) / n as f32);
        for i in 0..n {
            let normalised = (x[i] - mean) * inv_std;
            dx[i] = inv_std * normalised.mul_add(-gn_mean, d[i].mul_add(w[i], -g_mean));
        }
    }
}

vectorised! {
    fn add_parameter_gradients(d: &[f32], x: &[f32], mean: f32, inv_std: f32, dw: &mut [f32], db: &mut [f32]) {
        let n = d.len();
        let (x, dw, db) = (&x[..n], &mut dw[..n], &mut db[..n]);
        for i in 0..n {
            dw[i] = ((x[i] - mean) * inv_std).mul_add(d[i], dw[i]);
            db[i] += d[i];
        }
    }
}
