//! A rank is the number of those that are larger, counted: `n` is a few thousand.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource};

use crate::launch::{THREADS, launch, output};

const SOURCE: KernelSource = KernelSource { name: "log_rank", code: include_str!("log_rank.cu") };

pub(super) fn minus_log_rank(gpu: &Arc<Gpu>, y: &Tensor) -> Tensor {
    let [n, g] = y.dims();
    let mut ranked = output(gpu, [n, g]);
    let args = [y.into(), (&mut ranked).into(), (n as u32).into()];
    // SAFETY: both are `[n, g]`, and the grid has a thread for every element.
    unsafe { launch(gpu, &SOURCE, "minus_log_rank", [n.div_ceil(THREADS as usize), g, 1], THREADS, 0, &args) };
    ranked
}
