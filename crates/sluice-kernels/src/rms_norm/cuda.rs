//! A warp per row. The gradient of the weight is added up beside that of the input: every warp keeps its own sums of columns.

use std::sync::Arc;

use sluice_tensor::cuda::{Arg, Gpu, KernelSource};
use sluice_tensor::{DType, Tensor};

use crate::launch::{act, act_mut, activation, formats, launch, of_format, optional, output, over_rows, run, sum_of_parts};

static SOURCES: [KernelSource; 2] = formats!("rms_norm", "rms_norm.cu");

/// `y` is an activation, in the format of the precision.
pub(super) fn fwd(gpu: &Arc<Gpu>, x: &Tensor, weight: Option<&Tensor>, eps: f32) -> (Tensor, Tensor) {
    let (m, n_rows) = (x.last_dim(), x.n_rows());
    let x = x.to_dtype(DType::F32);
    let (mut y, mut inv_rms) = (activation(gpu, x.shape()), output(gpu, [n_rows]));
    let args =
        [(&x).into(), optional(weight), act_mut(&mut y), (&mut inv_rms).into(), (n_rows as u32).into(), (m as u32).into(), eps.into()];
    // SAFETY: `y` has the shape of `x`, `weight` (checked by the caller) its last, `inv_rms` an element per row.
    unsafe { run(gpu, of_format(&SOURCES, y.dtype()), "rms_norm_fwd", over_rows(n_rows), &args) };
    (y, inv_rms)
}

/// `dx` in the format of `x`, added to `before` if there is something.
pub(super) fn bwd(
    gpu: &Arc<Gpu>,
    before: Option<Tensor>,
    dy: &Tensor,
    x: &Tensor,
    weight: Option<&Tensor>,
    inv_rms: &Tensor,
) -> (Tensor, Option<Tensor>) {
    let (m, n_rows, dtype) = (x.last_dim(), x.n_rows(), x.dtype());
    let x = x.to_dtype(DType::F32);
    let warps = warps_that_fit(gpu, m);
    let blocks = n_rows.div_ceil(warps).min(4 * gpu.info().multiprocessors as usize);
    // In place if there is a sum so far.
    let has_before = before.is_some();
    let mut dx = before.map_or_else(|| output(gpu, x.shape()), |before| before.to_dtype(DType::F32));
    // The residual stream's gradient is the factor of products as well as a sum to go on with.
    let mut narrow = (gpu.precision().activations() == DType::Bf16).then(|| Tensor::empty_on(gpu, x.shape(), DType::Bf16));
    let mut partial = weight.map(|_| output(gpu, [blocks, m]));
    let dx_there: Arg = (&mut dx).into();
    let args = [
        act(dy),
        (&x).into(),
        optional(weight),
        inv_rms.into(),
        if has_before { dx_there } else { Arg::U64(0) },
        dx_there,
        narrow.as_mut().map_or(Arg::U64(0), act_mut),
        partial.as_mut().map_or(Arg::U64(0), Arg::from),
        (n_rows as u32).into(),
        (m as u32).into(),
    ];
    let shared = if partial.is_some() { 4 * warps * m } else { 0 };
    // SAFETY: all but `weight` have the rows of `x`, checked by the caller; `partial` has a row per block, shared memory one per warp.
    unsafe { launch(gpu, of_format(&SOURCES, dy.dtype()), "rms_norm_bwd", [blocks, 1, 1], 32 * warps as u32, shared as u32, &args) };
    let dweight = partial.map(|partial| sum_of_parts(&partial, blocks, [m]));
    match narrow {
        Some(narrow) if dtype == DType::Bf16 => (narrow, dweight),
        Some(narrow) => {
            dx.keep_rounded(narrow);
            (dx, dweight)
        }
        None => (dx.to_dtype(dtype), dweight),
    }
}

/// Warps of a block whose sums of `m` columns fit shared memory. Panics for rows of more than some fifty thousand columns.
fn warps_that_fit(gpu: &Gpu, m: usize) -> usize {
    let most = gpu.info().shared_memory_per_block as usize;
    [8, 4, 2, 1].into_iter().find(|warps| 4 * warps * m <= most).unwrap_or(1)
}
