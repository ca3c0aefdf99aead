//! Elementwise.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource};

use crate::launch::{output, over_elements, run};

const SOURCE: KernelSource = KernelSource { name: "swiglu", code: include_str!("swiglu.cu") };

pub(super) fn fwd(gpu: &Arc<Gpu>, gate: &Tensor, up: &Tensor) -> Tensor {
    let mut y = output(gpu, gate.shape());
    let n = gate.len();
    let args = [gate.into(), up.into(), (&mut y).into(), (n as u64).into()];
    // SAFETY: all have `n` elements, checked by the caller.
    unsafe { run(gpu, &SOURCE, "swiglu_fwd", over_elements(n), &args) };
    y
}

pub(super) fn bwd(gpu: &Arc<Gpu>, dy: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
    let (mut dgate, mut dup) = (output(gpu, gate.shape()), output(gpu, gate.shape()));
    let n = gate.len();
    let args = [dy.into(), gate.into(), up.into(), (&mut dgate).into(), (&mut dup).into(), (n as u64).into()];
    // SAFETY: all have `n` elements, checked by the caller.
    unsafe { run(gpu, &SOURCE, "swiglu_bwd", over_elements(n), &args) };
    (dgate, dup)
}
