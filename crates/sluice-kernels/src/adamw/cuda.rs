//! One pass over the four tensors of a step. The norm of all gradients costs one wait of the host, for all of them together.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource, or_raise};

use super::Factors;
use crate::launch::{act_mut, formats, of_format, over_elements, run};

static SOURCES: [KernelSource; 2] = formats!("adamw", "adamw.cu");

/// Blocks that share the squares of one tensor.
const NORM_BLOCKS: usize = 264;

pub(super) fn step(gpu: &Gpu, param: &mut Tensor, grad: &Tensor, m: &mut Tensor, v: &mut Tensor, f: Factors) {
    let n = param.len();
    let args = [
        param.into(),
        grad.into(),
        m.into(),
        v.into(),
        (n as u64).into(),
        f.grad_scale.into(),
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

/// Sum of the squares of everything.
pub(super) fn sum_of_squares(gpu: &Arc<Gpu>, tensors: &[&Tensor]) -> f64 {
    let partial = or_raise(gpu.alloc(tensors.len() * NORM_BLOCKS * 8));
    for (i, x) in tensors.iter().enumerate() {
        let slot = partial.address() + (i * NORM_BLOCKS * 8) as u64;
        let args = [(*x).into(), slot.into(), (x.len() as u64).into()];
        // SAFETY: every tensor has its own `NORM_BLOCKS` sums in `partial`, one per block.
        unsafe { run(gpu, &SOURCES[0], "sum_of_squares", [NORM_BLOCKS as u32, 1, 1], &args) };
    }
    let partial: Vec<f64> = or_raise(gpu.download_slice(&partial));
    partial.chunks(NORM_BLOCKS).map(|sums| sums.iter().sum::<f64>()).sum()
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
