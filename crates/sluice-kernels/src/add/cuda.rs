//! Elementwise.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource};

use crate::launch::{output, over_elements, run};

const SOURCE: KernelSource = KernelSource { name: "add", code: include_str!("add.cu") };

pub(super) fn fwd(gpu: &Arc<Gpu>, a: &Tensor, b: &Tensor) -> Tensor {
    let mut y = output(gpu, a.shape());
    let args = [a.into(), b.into(), (&mut y).into(), (a.len() as u64).into()];
    // SAFETY: all have the elements of `a`, checked by the caller.
    unsafe { run(gpu, &SOURCE, "add", over_elements(a.len()), &args) };
    y
}

pub(super) fn assign(gpu: &Arc<Gpu>, sum: &mut Tensor, x: &Tensor) {
    let n = sum.len();
    // SAFETY: both have `n` elements, checked by the caller.
    unsafe { run(gpu, &SOURCE, "add_assign", over_elements(n), &[sum.into(), x.into(), (n as u64).into()]) };
}
