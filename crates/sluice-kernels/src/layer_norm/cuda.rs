//! A warp per row, for inference a block that stays for several; gradients of weight and bias are sums of columns.

use std::sync::Arc;

use sluice_tensor::cuda::{Gpu, KernelSource};
use sluice_tensor::{DType, Tensor};

use crate::launch::{ColumnSums, act, act_mut, formats, launch, of_format, output, over_rows, run};

const SOURCE: KernelSource = KernelSource { name: "layer_norm", code: include_str!("layer_norm.cu") };

static RESIDUAL: [KernelSource; 2] = formats!("layer_norm_residual", "residual.cu");

pub(super) fn fwd_residual(
    gpu: &Arc<Gpu>,
    x: &Tensor,
    added: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f32,
) -> Tensor {
    let (m, n_rows) = (x.last_dim(), x.n_rows());
    assert_eq!(x.dtype(), residual.dtype(), "formats of a sum that is normalised");
    let mut y = Tensor::empty_on(gpu, x.shape(), x.dtype());
    let args = [
        act(x),
        added.into(),
        act(residual),
        weight.into(),
        bias.into(),
        act_mut(&mut y),
        (n_rows as u32).into(),
        (m as u32).into(),
        eps.into(),
    ];
    // As in the source: rows of up to 1024 columns have a block each, of a thread for every 16 bytes; others have a warp.
    let per_thread = 16 / x.dtype().size();
    let (threads, rows) = if m % per_thread == 0 && m <= 1024 { ((m / per_thread).next_multiple_of(32).max(32), 1) } else { (256, 8) };
    // Blocks that are at work at a time stay for all rows.
    let blocks = n_rows.div_ceil(rows).min(gpu.info().multiprocessors as usize * (1024 / threads).min(16));
    // SAFETY: all three have `n_rows` rows of `m`, the vectors `m` (checked by the caller).
    unsafe { launch(gpu, of_format(&RESIDUAL, x.dtype()), "layer_norm_residual", [blocks, 1, 1], threads as u32, 0, &args) };
    y
}

pub(super) fn fwd(gpu: &Arc<Gpu>, x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> (Tensor, Tensor, Tensor) {
    let (m, n_rows) = (x.last_dim(), x.n_rows());
    let x = &x.to_dtype(DType::F32);
    let (mut y, mut mean, mut inv_std) = (output(gpu, x.shape()), output(gpu, [n_rows]), output(gpu, [n_rows]));
    let args = [
        x.into(),
        weight.into(),
        bias.into(),
        (&mut y).into(),
        (&mut mean).into(),
        (&mut inv_std).into(),
        (n_rows as u32).into(),
        (m as u32).into(),
        eps.into(),
    ];
    // SAFETY: `y` has the shape of `x`, weight and bias (checked by the caller) its last, the moments an element per row.
    unsafe { run(gpu, &SOURCE, "layer_norm_fwd", over_rows(n_rows), &args) };
    (y, mean, inv_std)
}

pub(super) fn bwd(gpu: &Arc<Gpu>, dy: &Tensor, x: &Tensor, weight: &Tensor, mean: &Tensor, inv_std: &Tensor) -> (Tensor, Tensor, Tensor) {
    let (m, n_rows) = (x.last_dim(), x.n_rows());
    let (dy, x) = (&dy.to_dtype(DType::F32), &x.to_dtype(DType::F32));
    let (mut dx, mut normalised) = (output(gpu, x.shape()), output(gpu, x.shape()));
    let args = [
        dy.into(),
        x.into(),
        weight.into(),
        mean.into(),
        inv_std.into(),
        (&mut dx).into(),
        (&mut normalised).into(),
        (n_rows as u32).into(),
        (m as u32).into(),
    ];
    // SAFETY: shapes as above, checked by the caller.
    unsafe { run(gpu, &SOURCE, "layer_norm_bwd", over_rows(n_rows), &args) };
    let sums = |x, y| ColumnSums { x, y, row_scale: None, coefficients: None, n_out: 1 }.run(n_rows, m).reshape([m]);
    (dx, sums(&normalised, Some(dy)), sums(dy, None))
}
