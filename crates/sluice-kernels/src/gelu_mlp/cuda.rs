//! Two products of cuBLASLt and an elementwise kernel, chunk by chunk.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Epilogue, Gpu, Mat, gemm};

use crate::gelu;
use crate::launch::{activation, factor};

/// Rows of a chunk are a multiple of this, so that tiles of the products fit.
const TILE: usize = 256;

/// `chunk`: bytes of hidden activations.
pub(super) fn fwd(gpu: &Arc<Gpu>, x: &Tensor, up: &Tensor, up_bias: &Tensor, down: &Tensor, chunk: usize) -> Tensor {
    let ([f, m], n_rows) = (up.dims(), x.n_rows());
    let (up, down) = (&factor(gpu, up), &factor(gpu, down));
    let mut y = activation(gpu, x.shape());
    let row_bytes = f * gpu.precision().activations().size();
    let n_chunks = (n_rows * row_bytes).div_ceil(chunk).max(1);
    let per_chunk = n_rows.div_ceil(n_chunks).max(1).next_multiple_of(TILE);
    for first in (0..n_rows).step_by(per_chunk) {
        let n = per_chunk.min(n_rows - first);
        let mut hidden = activation(gpu, [n, f]);
        gemm(Mat::within(x, first * m, n, m, m), Mat::new(up, f, m).t(), &mut hidden, 0, f, Epilogue::default());
        let hidden = gelu::fwd_biased(hidden, up_bias);
        gemm(Mat::new(&hidden, n, f), Mat::new(down, m, f).t(), &mut y, first * m, m, Epilogue::default());
    }
    y
}
