//! One pass over the four tensors of a step. The norm of all gradients stays where they are, and so does the factor that clips them.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource, or_raise};

use super::Factors;
use crate::launch::{act_mut, formats, of_format, output, over_elements, run};

static SOURCES: [KernelSource; 2] = formats!("adamw", "adamw.cu");

/// Blocks that share the squares of one tensor.
const NORM_BLOCKS: usize = 264;

pub(super) fn step(gpu: &Gpu, param: &mut Tensor, grad: &Tensor, m: &mut Tensor, v: &mut Tensor, grad_scale: &Tensor, f: Factors) {
    let n = param.len();
    let args = [
        param.into(),
        grad.into(),
        m.into(),
        v.into(),
        (n as u64).into(),
        grad_scale.into(),
        f.keep.into(),
        f.beta2.into(),
        f.one_minus_beta1.into(),
        f.one_minus_beta2.into(),
        f.step_size.into(),
        f.inv_sqrt_correction2.into(),
        f.eps.into(),
    ];
    // SAFETY: all four have `n` elements, checked by the caller.
    unsafe { run(gpu, &SOURCES[0], "adamw_step", over_elements(n), &args) };
}

pub(super) fn global_norm(gpu: &Arc<Gpu>, tensors: &[&Tensor], clip: f32) -> (Tensor, Tensor) {
    let partial = or_raise(gpu.alloc(tensors.len() * NORM_BLOCKS * 8));
    for (i, x) in tensors.iter().enumerate() {
        let slot = partial.address() + (i * NORM_BLOCKS * 8) as u64;
        let args = [(*x).into(), slot.into(), (x.len() as u64).into()];
        // SAFETY: every tensor has its own `NORM_BLOCKS` sums in `partial`, one per block.
        unsafe { run(gpu, &SOURCES[0], "sum_of_squares", [NORM_BLOCKS as u32, 1, 1], &args) };
    }
    let (mut norm, mut factor) = (output(gpu, []), output(gpu, []));
    let n = (tensors.len() * NORM_BLOCKS) as u32;
    let args = [(&partial).into(), n.into(), clip.into(), (&mut norm).into(), (&mut factor).into()];
    // SAFETY: `partial` has `n` sums, the others one element.
    unsafe { run(gpu, &SOURCES[0], "norm_and_clip", [1, 1, 1], &args) };
    (norm, factor)
}

pub(super) fn scale(gpu: &Gpu, t: &mut Tensor, f: f32) {
    let n = t.len();
    // SAFETY: `n` elements.
    unsafe { run(gpu, of_format(&SOURCES, t.dtype()), "scale", over_elements(n), &[act_mut(t), f.into(), (n as u64).into()]) };
}

pub(super) fn scale_by(gpu: &Gpu, t: &mut Tensor, factor: &Tensor) {
    let n = t.len();
    // SAFETY: `n` elements, and one factor, checked by the caller.
    unsafe { run(gpu, of_format(&SOURCES, t.dtype()), "scale_by", over_elements(n), &[act_mut(t), factor.into(), (n as u64).into()]) };
}

pub(super) fn raise_to_zero(gpu: &Gpu, t: &mut Tensor) {
    let n = t.len();
    // SAFETY: `n` elements.
    unsafe { run(gpu, &SOURCES[0], "raise_to_zero", over_elements(n), &[t.into(), (n as u64).into()]) };
}
