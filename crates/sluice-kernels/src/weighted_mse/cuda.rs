//! A warp per row; the rows are added in f64 by one block.

use std::sync::Arc;

use sluice_tensor::cuda::{Gpu, KernelSource};
use sluice_tensor::{DType, Tensor};

use super::TINY;
use crate::launch::{output, over_elements, over_rows, run, sum_to_scalar};

const SOURCE: KernelSource = KernelSource { name: "weighted_mse", code: include_str!("weighted_mse.cu") };

pub(super) fn fwd(gpu: &Arc<Gpu>, a: &Tensor, b: &Tensor, weights: &Tensor) -> (Tensor, Tensor) {
    let (m, n_rows) = (a.last_dim(), a.n_rows());
    let [a, b] = &[a, b].map(|x| x.to_dtype(DType::F32));
    let (mut terms, mut factors) = (output(gpu, [n_rows]), output(gpu, [n_rows]));
    let args = [
        a.into(),
        b.into(),
        weights.into(),
        (&mut terms).into(),
        (&mut factors).into(),
        (n_rows as u32).into(),
        (m as u32).into(),
        TINY.into(),
    ];
    // SAFETY: `a` and `b` have `n_rows` rows of `m`, the others an element per row.
    unsafe { run(gpu, &SOURCE, "weighted_mse_fwd", over_rows(n_rows), &args) };
    (sum_to_scalar(&terms), factors)
}

pub(super) fn bwd(gpu: &Arc<Gpu>, dy: &Tensor, a: &Tensor, b: &Tensor, factors: &Tensor) -> Tensor {
    let [a, b] = &[a, b].map(|x| x.to_dtype(DType::F32));
    let mut da = output(gpu, a.shape());
    let (n, m) = (a.len(), a.last_dim());
    let args = [dy.into(), a.into(), b.into(), factors.into(), (&mut da).into(), (n as u64).into(), (m as u32).into()];
    // SAFETY: `a`, `b` and `da` have `n` elements in rows of `m`, `factors` one per row, `dy` one.
    unsafe { run(gpu, &SOURCE, "weighted_mse_bwd", over_elements(n), &args) };
    da
}
