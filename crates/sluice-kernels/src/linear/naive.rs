//! The specification: triple loops in f64.

use sluice_tensor::{DType, Tensor};

/// `x w^T + bias`.
pub fn fwd(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Vec<f64> {
    let [n_out, n_in] = w.dims();
    let (x, w) = (x.f32(), w.to_dtype(DType::F32));
    let n_rows: usize = x.len().checked_div(n_in).unwrap_or(0);
    let mut y = vec![0.0; n_rows * n_out];
    for i in 0..n_rows {
        for j in 0..n_out {
            let product: f64 = (0..n_in).map(|p| x[i * n_in + p] as f64 * w.f32()[j * n_in + p] as f64).sum();
            y[i * n_out + j] = product + bias.map_or(0.0, |b| b.f32()[j] as f64);
        }
    }
    y
}

/// `dy w`.
pub fn bwd_input(dy: &Tensor, w: &Tensor) -> Vec<f64> {
    let [n_out, n_in] = w.dims();
    let (dy, w) = (dy.f32(), w.to_dtype(DType::F32));
    let n_rows = dy.len().checked_div(n_out).unwrap_or(0);
    let mut dx = vec![0.0; n_rows * n_in];
    for i in 0..n_rows {
        for p in 0..n_in {
            dx[i * n_in + p] = (0..n_out).map(|j| dy[i * n_out + j] as f64 * w.f32()[j * n_in + p] as f64).sum();
        }
    }
    dx
}

/// `dy^T x`.
pub fn bwd_weight(dy: &Tensor, x: &Tensor) -> Vec<f64> {
    let (n_out, n_in, n_rows) = (dy.last_dim(), x.last_dim(), dy.n_rows());
    let mut dw = vec![0.0; n_out * n_in];
    for i in 0..n_rows {
        for j in 0..n_out {
            for p in 0..n_in {
                dw[j * n_in + p] += dy.f32()[i * n_out + j] as f64 * x.f32()[i * n_in + p] as f64;
            }
        }
    }
    dw
}

/// Column sums of `dy`.
pub fn bwd_bias(dy: &Tensor) -> Vec<f64> {
    let n = dy.last_dim();
    let mut db = vec![0.0; n];
    for (i, &d) in dy.f32().iter().enumerate() {
        db[i % n] += d as f64;
    }
    db
}
