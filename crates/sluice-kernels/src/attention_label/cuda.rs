//! Gram matrices of the heads, then a warp per value.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource};

use crate::launch::{ROWS, launch, output, over_elements, over_rows, run};

const SOURCE: KernelSource = KernelSource { name: "attention_label", code: include_str!("attention_label.cu") };

/// Side of the part of a Gram matrix that a block has.
const TILE: usize = 16;

pub(super) fn key_weight(gpu: &Arc<Gpu>, w_o: &Tensor, v: &Tensor, n_heads: usize) -> Tensor {
    let ([b, s, g, d], m) = (v.dims(), w_o.shape()[0]);
    let mut gram = output(gpu, [n_heads, d, d]);
    let mut norms = output(gpu, [b, s, n_heads]);
    let side = d.div_ceil(TILE);
    let args = [w_o.into(), (&mut gram).into(), (m as u32).into(), (d as u32).into()];
    // SAFETY: `w_o` is `[m, n_heads d]`, as the caller checked; the grid covers `gram`.
    unsafe { launch(gpu, &SOURCE, "gram", [side, side, n_heads], (TILE * TILE) as u32, 0, &args) };
    let n_rows = b * s;
    let sizes = [n_rows, n_heads, g, d].map(|x| (x as u32).into());
    let args: Vec<_> = [v.into(), (&gram).into(), (&mut norms).into()].into_iter().chain(sizes).collect();
    // SAFETY: shapes as above.
    unsafe { run(gpu, &SOURCE, "quadratic_forms", [n_rows.div_ceil(ROWS as usize) as u32, n_heads as u32, 1], &args) };
    norms
}

pub(super) fn query_weight(gpu: &Arc<Gpu>, h: &Tensor) -> Tensor {
    let [b, t, m] = h.dims();
    let mut weights = output(gpu, [b, t]);
    let args = [h.into(), (&mut weights).into(), ((b * t) as u32).into(), (m as u32).into()];
    // SAFETY: a weight per row of `m`.
    unsafe { run(gpu, &SOURCE, "query_weight", over_rows(b * t), &args) };
    weights
}

pub(super) fn label(gpu: &Arc<Gpu>, mass: &Tensor) -> Tensor {
    let mut labels = output(gpu, mass.shape());
    let n = mass.len();
    // SAFETY: both have `n` elements.
    unsafe { run(gpu, &SOURCE, "label", over_elements(n), &[mass.into(), (&mut labels).into(), (n as u64).into()]) };
    labels
}
