//! Elementwise.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource};

use crate::launch::{output, over_elements, run};

const SOURCE: KernelSource = KernelSource { name: "gumbel", code: include_str!("gumbel.cu") };

pub(super) fn add_noise(gpu: &Arc<Gpu>, scores: &Tensor, seed: u64, stream: u64, scale: f32) -> Tensor {
    let mut noisy = output(gpu, scores.shape());
    let n = scores.len();
    let args = [scores.into(), (&mut noisy).into(), (n as u64).into(), seed.into(), stream.into(), scale.into()];
    // SAFETY: both have `n` elements.
    unsafe { run(gpu, &SOURCE, "add_gumbel", over_elements(n), &args) };
    noisy
}
