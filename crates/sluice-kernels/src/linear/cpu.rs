//! The three products of a linear layer on slices, with `w` in either format.

use half::slice::HalfFloatSliceExt;
use sluice_tensor::gemm::{Mat, gemm};
use sluice_tensor::memory::Scratch;
use sluice_tensor::{DType, Tensor};

/// Elements of `w` widened from bf16 at a time: 1 MiB of f32, half of a usual L2 cache's worth per core.
const WIDENED: usize = 1 << 18;

/// `y [n_rows, N] = x [n_rows, K] w^T`; whatever was in `y` is overwritten.
#[track_caller]
pub(crate) fn project(x: &[f32], n_rows: usize, w: &Tensor, y: &mut [f32]) {
    let [n_out, n_in] = w.dims();
    for_each_block_of_rows(w, |first, block, n| {
        gemm(Mat::new(x, n_rows, n_in), Mat::new(block, n, n_in).t(), &mut y[first.min(n_rows * n_out)..], n_out, false);
    });
}

/// `dx [n_rows, K] = dy [n_rows, N] w`; whatever was in `dx` is overwritten.
#[track_caller]
pub(crate) fn project_back(dy: &[f32], n_rows: usize, w: &Tensor, dx: &mut [f32]) {
    let [n_out, n_in] = w.dims();
    if n_out == 0 {
        dx.fill(0.0);
    }
    for_each_block_of_rows(w, |first, block, n| {
        let dy = Mat::with_row_stride(&dy[first.min(n_rows * n_out)..], n_rows, n, n_out);
        gemm(dy, Mat::new(block, n, n_in), dx, n_in, first > 0);
    });
}

/// `dw [N, K] += dy [n_rows, N]^T x [n_rows, K]`.
#[track_caller]
pub(crate) fn accumulate_weight_gradient(dy: &[f32], x: &[f32], n_rows: usize, dw: &mut [f32], n_out: usize, n_in: usize) {
    gemm(Mat::new(dy, n_rows, n_out).t(), Mat::new(x, n_rows, n_in), dw, n_in, true);
}

/// `work(first row, f32 elements, number of rows)` for blocks of rows that cover `w`.
fn for_each_block_of_rows(w: &Tensor, mut work: impl FnMut(usize, &[f32], usize)) {
    let [n_out, n_in] = w.dims();
    match w.dtype() {
        DType::F32 => work(0, w.f32(), n_out),
        DType::Bf16 => {
            let per_block = (WIDENED / n_in.max(1)).clamp(1, n_out.max(1));
            let mut scratch = Scratch::zeros(per_block * n_in);
            for first in (0..n_out).step_by(per_block) {
                let n = per_block.min(n_out - first);
                let block = &mut scratch[..n * n_in];
                w.bf16()[first * n_in..(first + n) * n_in].convert_to_f32_slice(block);
                work(first, block, n);
            }
        }
    }
}
