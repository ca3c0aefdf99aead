//! Elementwise; with a bias, a block for some rows and columns.

use std::sync::Arc;

use sluice_tensor::cuda::{Gpu, KernelSource};
use sluice_tensor::{DType, Tensor};

use crate::launch::{THREADS, act_mut, formats, of_format, output, over_elements, run};

const SOURCE: KernelSource = KernelSource { name: "gelu", code: include_str!("gelu.cu") };

static BIASED: [KernelSource; 2] = formats!("gelu_biased", "biased.cu");

pub(super) fn fwd_biased(gpu: &Gpu, x: &mut Tensor, bias: &Tensor) {
    /// Rows of a block, as in the source.
    const ROWS: usize = 4;
    let (n_rows, n) = (x.n_rows(), x.last_dim());
    let source = of_format(&BIASED, x.dtype());
    let columns_per_block = THREADS as usize * 16 / x.dtype().size();
    let grid = [n_rows.div_ceil(ROWS) as u32, n.div_ceil(columns_per_block) as u32, 1];
    // SAFETY: `x` has `n_rows` rows of `n`, `bias` has `n` (checked by the caller).
    unsafe { run(gpu, source, "gelu_biased", grid, &[act_mut(x), bias.into(), (n_rows as u32).into(), (n as u32).into()]) };
}

pub(super) fn fwd(gpu: &Arc<Gpu>, x: &Tensor) -> Tensor {
    let x = &x.to_dtype(DType::F32);
    let mut y = output(gpu, x.shape());
    let n = x.len();
    // SAFETY: both have `n` elements.
    unsafe { run(gpu, &SOURCE, "gelu_fwd", over_elements(n), &[x.into(), (&mut y).into(), (n as u64).into()]) };
    y
}

pub(super) fn bwd(gpu: &Arc<Gpu>, dy: &Tensor, x: &Tensor) -> Tensor {
    let (dy, x) = (&dy.to_dtype(DType::F32), &x.to_dtype(DType::F32));
    let mut dx = output(gpu, x.shape());
    let n = x.len();
    // SAFETY: all have `n` elements, checked by the caller.
    unsafe { run(gpu, &SOURCE, "gelu_bwd", over_elements(n), &[dy.into(), x.into(), (&mut dx).into(), (n as u64).into()]) };
    dx
}
