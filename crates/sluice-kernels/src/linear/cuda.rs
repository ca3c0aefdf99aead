//! Three products of cuBLASLt; the bias rides on the first. `y` and `dx` are activations, in the format of the precision.

use std::sync::Arc;

use sluice_tensor::cuda::{Epilogue, Gpu, Mat, gemm};
use sluice_tensor::{DType, Tensor};

use crate::launch::{ColumnSums, activation, factor, output};

/// `y [n_rows, N]`.
pub(super) fn fwd(gpu: &Arc<Gpu>, x: &Tensor, n_rows: usize, w: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let shape = [n_rows, w.shape()[0]];
    match bias {
        None => fwd_to(gpu, activation(gpu, shape), x, w, None),
        // cuBLASLt would round the product before it adds a bias to a narrow result.
        bias => fwd_to(gpu, output(gpu, shape), x, w, bias).to_dtype(gpu.precision().activations()),
    }
}

/// The same with the bias in the format of activations.
pub(super) fn fwd_narrow_bias(gpu: &Arc<Gpu>, x: &Tensor, n_rows: usize, w: &Tensor, bias: &Tensor) -> Tensor {
    fwd_to(gpu, activation(gpu, [n_rows, w.shape()[0]]), x, w, Some(&factor(gpu, bias)))
}

/// The same in f32.
pub(super) fn fwd_f32(gpu: &Arc<Gpu>, x: &Tensor, n_rows: usize, w: &Tensor) -> Tensor {
    fwd_to(gpu, output(gpu, [n_rows, w.shape()[0]]), x, w, None)
}

fn fwd_to(gpu: &Arc<Gpu>, mut y: Tensor, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let ([n_rows, _], [n_out, n_in]) = (y.dims(), w.dims());
    let w = &factor(gpu, w);
    gemm(Mat::new(x, n_rows, n_in), Mat::new(w, n_out, n_in).t(), &mut y, 0, n_out, Epilogue { bias, accumulate: false });
    match bias {
        // An empty product has no epilogue to add the bias in.
        Some(bias) if n_in == 0 => {
            let ones = Tensor::full(1.0, [n_rows, 1]).to(&w.device());
            gemm(Mat::new(&ones, n_rows, 1), Mat::new(bias, 1, n_out), &mut y, 0, n_out, Epilogue::default());
            y
        }
        _ => y,
    }
}

/// `before + dx`, `[n_rows, K]`.
pub(super) fn bwd_input(gpu: &Arc<Gpu>, before: Option<Tensor>, dy: &Tensor, n_rows: usize, w: &Tensor) -> Tensor {
    let [n_out, n_in] = w.dims();
    let w = &factor(gpu, w);
    let epilogue = Epilogue { accumulate: before.is_some(), bias: None };
    let mut dx = before.unwrap_or_else(|| activation(gpu, [n_rows, n_in]));
    let format = dx.dtype();
    if n_rows == 1 && epilogue.accumulate {
        // For a single row cuBLASLt rounds the product before it adds to a narrow result.
        dx = dx.to_dtype(DType::F32);
    }
    gemm(Mat::new(dy, n_rows, n_out), Mat::new(w, n_out, n_in), &mut dx, 0, n_in, epilogue);
    dx.to_dtype(format)
}

/// `dw [N, K]`.
pub(super) fn bwd_weight(gpu: &Arc<Gpu>, dy: &Tensor, x: &Tensor, n_rows: usize) -> Tensor {
    let (n_out, n_in) = (dy.last_dim(), x.last_dim());
    let mut dw = output(gpu, [n_out, n_in]);
    gemm(Mat::new(dy, n_rows, n_out).t(), Mat::new(x, n_rows, n_in), &mut dw, 0, n_in, Epilogue::default());
    dw
}

/// `db [N]`.
pub(super) fn bwd_bias(dy: &Tensor, n_rows: usize) -> Tensor {
    let n = dy.last_dim();
    ColumnSums { x: dy, y: None, row_scale: None, coefficients: None, n_out: 1 }.run(n_rows, n).reshape([n])
}
