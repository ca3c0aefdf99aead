//! Launch of `whole_tf32.cu`: the forward pass of an encoder's attention with factors rounded to TF32, for tensors in f32.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Arg, Gpu, KernelSource, Precision};

use super::WHOLE;
use crate::launch::{launch, output};
use crate::routed_attention::Dims;
use crate::routed_attention::gpu_routing::upload_lens;

macro_rules! source {
    ($name:literal, $head_dim:literal) => {
        KernelSource { name: $name, code: concat!("#define HEAD_DIM ", $head_dim, "\n", include_str!("whole_tf32.cu")) }
    };
}

static WIDTHS: [(usize, KernelSource); 2] = [(32, source!("whole_tf32_32", "32")), (64, source!("whole_tf32_64", "64"))];

/// Queries of a block.
const ROWS: usize = 64;

fn source(d: usize) -> Option<&'static KernelSource> {
    WIDTHS.iter().find(|(width, _)| *width == d).map(|(_, source)| source)
}

/// Whether factors may be rounded and the kernel has this width.
pub(super) fn serves(gpu: &Gpu, dims: &Dims, start: usize) -> bool {
    start == WHOLE && gpu.precision() != Precision::F32 && source(dims.d).is_some()
}

/// `(o [B, T, H, D], lse [B, T, H])`.
pub(super) fn fwd(gpu: &Arc<Gpu>, dims: &Dims, [q, k, v]: [&Tensor; 3], lens: &[usize]) -> (Tensor, Tensor) {
    let source = source(dims.d).expect("asked before");
    let (mut o, mut lse) = (output(gpu, q.shape()), output(gpu, &q.shape()[..3]));
    let lens = upload_lens(gpu, lens);
    let sizes = [dims.t, dims.h, dims.g].map(|x| Arg::I32(x as i32));
    let args: Vec<Arg> =
        [q.into(), k.into(), v.into(), (&lens).into(), (&mut o).into(), (&mut lse).into()].into_iter().chain(sizes).collect();
    let grid = [dims.b * dims.h, dims.t.div_ceil(ROWS), 1];
    // SAFETY: shapes were checked by the caller; `lens` keeps queries and keys within `t`.
    unsafe { launch(gpu, source, "whole_tf32_fwd", grid, 128, 0, &args) };
    (o, lse)
}
