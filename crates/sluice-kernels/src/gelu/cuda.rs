//! Elementwise.

use std::sync::Arc;

use sluice_tensor::cuda::{Gpu, KernelSource};
use sluice_tensor::{DType, Tensor};

use crate::launch::{output, over_elements, run};

const SOURCE: KernelSource = KernelSource { name: "gelu", code: include_str!("gelu.cu") };

pub(super) fn fwd(gpu: &Arc<Gpu>, x: &Tensor) -> Tensor {
    let x = &x.to_dtype(DType::F32);
    let mut y = output(gpu, x.shape());
    let n = x.len();
    // SAFETY: both have `n` elements.
    unsafe { run(gpu, &SOURCE, "gelu_fwd", over_elements(n), &[x.into(), (&mut y).into(), (n as u64).into()]) };
    y
}

pub(super) fn bwd(gpu: &Arc<Gpu>, dy: &Tensor, x: &Tensor) -> Tensor {
    let (dy, x) = (&dy.to_dtype(DType::F32), &x.to_dtype(DType::F32));
    let mut dx = output(gpu, x.shape());
    let n = x.len();
    // SAFETY: all have `n` elements, checked by the caller.
    unsafe { run(gpu, &SOURCE, "gelu_bwd", over_elements(n), &[dy.into(), x.into(), (&mut dx).into(), (n as u64).into()]) };
    dx
}
