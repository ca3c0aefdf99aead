//! Launch of `whole_tf32.cu`: the forward pass of an encoder's attention with factors rounded to TF32, for tensors in f32.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Arg, Buffer, Gpu, KernelSource, Precision};

use super::WHOLE;
use crate::launch::{launch, output};
use crate::routed_attention::Dims;

macro_rules! source {
    ($name:literal, $head_dim:literal) => {
        KernelSource {
            name: $name,
            code: concat!(
                "#define HEAD_DIM ",
                $head_dim,
                "\n",
                include_str!("../attention_tile/walk_tf32.cuh"),
                "\n",
                include_str!("whole_tf32.cu")
            ),
        }
    };
}

static WIDTHS: [(usize, KernelSource); 2] = [(32, source!("whole_tf32_32", "32")), (64, source!("whole_tf32_64", "64"))];

/// Queries of a block, and keys of a step.
const ROWS: usize = 64;
const KEYS: usize = 64;

fn source(d: usize) -> Option<&'static KernelSource> {
    WIDTHS.iter().find(|(width, _)| *width == d).map(|(_, source)| source)
}

/// Whether factors may be rounded and the kernel has this width.
pub(super) fn serves(gpu: &Gpu, dims: &Dims, start: usize) -> bool {
    start == WHOLE && gpu.precision() != Precision::F32 && source(dims.d).is_some()
}

/// `(o [B, T, H, D], lse [B, T, H])` of factors in f32; `rows`: of a token in what they lie in, 3 for `[B, T, 3, H, D]`.
pub(super) fn fwd(gpu: &Arc<Gpu>, dims: &Dims, [q, k, v]: [Arg; 3], rows: usize, lens: &Buffer) -> (Tensor, Tensor) {
    let Dims { b, t, h, g, d, .. } = *dims;
    let source = source(d).expect("asked before");
    let (mut o, mut lse) = (output(gpu, [b, t, h, d]), output(gpu, [b, t, h]));
    let sizes = [t, h, g, rows * h, rows * g].map(|x| Arg::I32(x as i32));
    let args: Vec<Arg> = [q, k, v, lens.into(), (&mut o).into(), (&mut lse).into()].into_iter().chain(sizes).collect();
    // Two stages of keys and values, rows four words longer than a head.
    let shared = 4 * (2 * 2 * KEYS * (d + 4)) as u32;
    // SAFETY: shapes were checked by the caller; `lens` keeps queries and keys within `t`.
    unsafe { launch(gpu, source, "whole_tf32_fwd", [b * h, t.div_ceil(ROWS), 1], 128, shared, &args) };
    (o, lse)
}
