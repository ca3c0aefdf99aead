//! Elementwise, four elements a thread; results in the format of `gate`.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource};

use crate::launch::{act, act_mut, formats, of_format, over_elements, run};

static SOURCES: [KernelSource; 2] = formats!("swiglu", "swiglu.cu");

pub(super) fn fwd(gpu: &Arc<Gpu>, gate: &Tensor, up: &Tensor) -> Tensor {
    let dtype = gate.dtype();
    let up = up.to_dtype(dtype);
    let mut y = Tensor::empty_on(gpu, gate.shape(), dtype);
    let n = gate.len();
    let args = [act(gate), act(&up), act_mut(&mut y), (n as u64).into()];
    // SAFETY: all have `n` elements, checked by the caller.
    unsafe { run(gpu, of_format(&SOURCES, dtype), "swiglu_fwd", over_elements(n.div_ceil(4)), &args) };
    y
}

pub(super) fn bwd(gpu: &Arc<Gpu>, dy: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
    let dtype = gate.dtype();
    let [dy, up] = [dy, up].map(|x| x.to_dtype(dtype));
    let [mut dgate, mut dup] = [0; 2].map(|_| Tensor::empty_on(gpu, gate.shape(), dtype));
    let n = gate.len();
    let args = [act(&dy), act(gate), act(&up), act_mut(&mut dgate), act_mut(&mut dup), (n as u64).into()];
    // SAFETY: all have `n` elements, checked by the caller.
    unsafe { run(gpu, of_format(&SOURCES, dtype), "swiglu_bwd", over_elements(n.div_ceil(4)), &args) };
    (dgate, dup)
}
