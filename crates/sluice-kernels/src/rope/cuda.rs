//! A thread per token and pair; the result in the format of `x`.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource, or_raise};

use super::RopeStyle;
use crate::launch::{act, act_mut, formats, of_format, over_elements, run};

static SOURCES: [KernelSource; 2] = formats!("rope", "rope.cu");

pub(super) fn rotate(gpu: &Arc<Gpu>, x: &Tensor, positions: &[u32], inv_freq: &[f32], style: RopeStyle, direction: f32) -> Tensor {
    let [b, t, n_heads, head_dim] = x.dims();
    let (positions, inv_freq) = (or_raise(gpu.upload_slice(positions)), or_raise(gpu.upload_slice(inv_freq)));
    let mut y = Tensor::empty_on(gpu, x.shape(), x.dtype());
    let n_tokens = b * t;
    let args = [
        act(x),
        (&positions).into(),
        (&inv_freq).into(),
        act_mut(&mut y),
        (n_tokens as u64).into(),
        (t as u32).into(),
        (n_heads as u32).into(),
        (head_dim as u32 / 2).into(),
        u32::from(style == RopeStyle::Interleaved).into(),
        direction.into(),
    ];
    // SAFETY: `y` has the shape of `x`; positions and frequencies have `t` and `D / 2` entries, checked by the caller.
    unsafe { run(gpu, of_format(&SOURCES, x.dtype()), "rope", over_elements(n_tokens * head_dim / 2), &args) };
    y
}
