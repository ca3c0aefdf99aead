//! Elementwise, four elements a thread.

use std::sync::Arc;

use sluice_tensor::cuda::{Gpu, KernelSource};
use sluice_tensor::{DType, Tensor};

use crate::launch::{act, act_mut, formats, of_format, output, over_elements, run};

static SOURCES: [KernelSource; 2] = formats!("add", "add.cu");

pub(super) fn fwd(gpu: &Arc<Gpu>, a: &Tensor, b: &Tensor) -> Tensor {
    let a = a.to_dtype(DType::F32);
    let mut y = output(gpu, a.shape());
    let args = [(&a).into(), act(b), (&mut y).into(), (a.len() as u64).into()];
    // SAFETY: all have the elements of `a`, checked by the caller.
    unsafe { run(gpu, of_format(&SOURCES, b.dtype()), "add", over_elements(a.len().div_ceil(4)), &args) };
    y
}

pub(super) fn assign(gpu: &Arc<Gpu>, sum: &mut Tensor, x: &Tensor) {
    let n = sum.len();
    let (name, x) = match sum.dtype() {
        DType::F32 => ("add_assign", x.clone()),
        DType::Bf16 => ("add_assign_act", x.to_dtype(DType::Bf16)),
    };
    // SAFETY: both have `n` elements, checked by the caller.
    unsafe { run(gpu, of_format(&SOURCES, x.dtype()), name, over_elements(n.div_ceil(4)), &[act_mut(sum), act(&x), (n as u64).into()]) };
}
