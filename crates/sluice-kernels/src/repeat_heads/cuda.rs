//! A thread per element of the result.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource};

use crate::launch::{output, over_elements, run};

const SOURCE: KernelSource = KernelSource { name: "repeat_heads", code: include_str!("repeat_heads.cu") };

pub(super) fn fwd(gpu: &Arc<Gpu>, x: &Tensor, shape: Vec<usize>) -> Tensor {
    let mut y = output(gpu, shape);
    let (elements, n) = (y.len(), y.last_dim());
    let args = [x.into(), (&mut y).into(), (elements as u64).into(), (n as u32).into()];
    // SAFETY: `y` has `n` elements for each of `x`.
    unsafe { run(gpu, &SOURCE, "repeat_heads_fwd", over_elements(elements), &args) };
    y
}

pub(super) fn bwd(gpu: &Arc<Gpu>, dy: &Tensor, shape: Vec<usize>) -> Tensor {
    let mut dx = output(gpu, shape);
    let (elements, n) = (dx.len(), dy.last_dim());
    let args = [dy.into(), (&mut dx).into(), (elements as u64).into(), (n as u32).into()];
    // SAFETY: `dy` has `n` elements for each of `dx`.
    unsafe { run(gpu, &SOURCE, "repeat_heads_bwd", over_elements(elements), &args) };
    dx
}
