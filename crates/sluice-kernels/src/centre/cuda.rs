//! A block per column of a sequence.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource, or_raise};

use crate::launch::{output, run};

const SOURCE: KernelSource = KernelSource { name: "centre", code: include_str!("centre.cu") };

pub(super) fn fwd(gpu: &Arc<Gpu>, x: &Tensor, lens: &[usize]) -> Tensor {
    let [b, t, g] = x.dims();
    let mut y = output(gpu, x.shape());
    if !x.is_empty() {
        let lens = or_raise(gpu.upload_slice(&lens.iter().map(|&len| len as u32).collect::<Vec<_>>()));
        let args = [x.into(), (&lens).into(), (&mut y).into(), (t as u32).into(), (g as u32).into()];
        // SAFETY: `y` has the shape of `x`; the caller checked the lengths.
        unsafe { run(gpu, &SOURCE, "centre", [g as u32, b as u32, 1], &args) };
    }
    y
}
