//! A thread for every column of a sequence.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource};

use crate::launch::{THREADS, act, formats, of_format, output, run};
use crate::routed_attention::gpu_routing::upload_lens;

static SOURCES: [KernelSource; 2] = formats!("mean_pool", "mean_pool.cu");

pub(super) fn fwd(gpu: &Arc<Gpu>, x: &Tensor, lens: &[usize]) -> Tensor {
    let [b, t, m] = x.dims();
    let mut y = output(gpu, [b, m]);
    let lens = upload_lens(gpu, lens);
    let args = [act(x), (&lens).into(), (&mut y).into(), (t as u32).into(), (m as u32).into()];
    let grid = [m.div_ceil(THREADS as usize) as u32, b as u32, 1];
    // SAFETY: the caller checked that no length exceeds `t`.
    unsafe { run(gpu, of_format(&SOURCES, x.dtype()), "mean_pool", grid, &args) };
    y
}
