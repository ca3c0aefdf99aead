//! A warp per row; the gradient of the weight is a sum of columns.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource};

use crate::launch::{ColumnSums, optional, output, over_rows, run};

const SOURCE: KernelSource = KernelSource { name: "rms_norm", code: include_str!("rms_norm.cu") };

pub(super) fn fwd(gpu: &Arc<Gpu>, x: &Tensor, weight: Option<&Tensor>, eps: f32) -> (Tensor, Tensor) {
    let (m, n_rows) = (x.last_dim(), x.n_rows());
    let (mut y, mut inv_rms) = (output(gpu, x.shape()), output(gpu, [n_rows]));
    let args = [x.into(), optional(weight), (&mut y).into(), (&mut inv_rms).into(), (n_rows as u32).into(), (m as u32).into(), eps.into()];
    // SAFETY: `y` has the shape of `x`, `weight` (checked by the caller) its last, `inv_rms` an element per row.
    unsafe { run(gpu, &SOURCE, "rms_norm_fwd", over_rows(n_rows), &args) };
    (y, inv_rms)
}

pub(super) fn bwd(gpu: &Arc<Gpu>, dy: &Tensor, x: &Tensor, weight: Option<&Tensor>, inv_rms: &Tensor) -> (Tensor, Option<Tensor>) {
    let (m, n_rows) = (x.last_dim(), x.n_rows());
    let mut dx = output(gpu, x.shape());
    let args = [dy.into(), x.into(), optional(weight), inv_rms.into(), (&mut dx).into(), (n_rows as u32).into(), (m as u32).into()];
    // SAFETY: all but `weight` have the rows of `x`, checked by the caller.
    unsafe { run(gpu, &SOURCE, "rms_norm_bwd", over_rows(n_rows), &args) };
    let dweight = weight.map(|w| {
        let sums = ColumnSums { x, y: Some(dy), row_scale: Some(inv_rms), coefficients: None, n_out: 1 };
        sums.run(n_rows, m).reshape(w.shape())
    });
    (dx, dweight)
}
