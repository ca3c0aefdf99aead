//! A thread per token and pair.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource, or_raise};

use super::RopeStyle;
use crate::launch::{output, over_elements, run};

const SOURCE: KernelSource = KernelSource { name: "rope", code: include_str!("rope.cu") };

pub(super) fn rotate(gpu: &Arc<Gpu>, x: &Tensor, positions: &[u32], inv_freq: &[f32], style: RopeStyle, direction: f32) -> Tensor {
    let [b, t, n_heads, head_dim] = x.dims();
    let (positions, inv_freq) = (or_raise(gpu.upload_slice(positions)), or_raise(gpu.upload_slice(inv_freq)));
    let mut y = output(gpu, x.shape());
    let n_tokens = b * t;
    let args = [
        x.into(),
        (&positions).into(),
        (&inv_freq).into(),
        (&mut y).into(),
        (n_tokens as u64).into(),
        (t as u32).into(),
        (n_heads as u32).into(),
        (head_dim as u32 / 2).into(),
        u32::from(style == RopeStyle::Interleaved).into(),
        direction.into(),
    ];
    // SAFETY: `y` has the shape of `x`; positions and frequencies have `t` and `D / 2` entries, checked by the caller.
    unsafe { run(gpu, &SOURCE, "rope", over_elements(n_tokens * head_dim / 2), &args) };
    y
}
