//! Launches of `dense_bf16.cu` and `short_bf16.cu`: heads of 64 and 128, factors of products bf16, sums and softmax f32; results in the format of `q`.

use std::sync::Arc;

use sluice_tensor::cuda::{Arg, Buffer, Gpu, KernelSource, Precision};
use sluice_tensor::{DType, Tensor};

use crate::launch::{act, act_mut, launch, output};
use crate::routed_attention::Dims;

macro_rules! source {
    ($name:literal, $head_dim:literal, $($file:literal),+) => {
        KernelSource {
            name: $name,
            code: concat!("#define HEAD_DIM ", $head_dim, "\n", include_str!("../attention_tile/tile.cuh") $(, "\n", include_str!($file))+),
        }
    };
}

/// What depends on the width of a head: warpgroups of 64 rows (or keys) of a block, as in the source.
struct Width {
    head_dim: usize,
    source: KernelSource,
    fwd: usize,
    dq: usize,
    dkv: usize,
}

const WIDTH_64: Width =
    Width { head_dim: 64, source: source!("dense_bf16_64", "64", "../attention_tile/walk.cuh", "dense_bf16.cu"), fwd: 2, dq: 1, dkv: 1 };
const WIDTH_128: Width =
    Width { head_dim: 128, source: source!("dense_bf16_128", "128", "../attention_tile/walk.cuh", "dense_bf16.cu"), fwd: 3, dq: 1, dkv: 1 };

static SHORT_64: KernelSource = source!("short_bf16_64", "64", "short_bf16.cu");

/// Most tokens of that source.
const SHORT: usize = 128;

/// Rows or keys of a warpgroup, and of a step.
const TILE: usize = 64;

/// One call.
pub(super) struct Call<'a> {
    gpu: &'a Arc<Gpu>,
    width: &'static Width,
    dims: &'a Dims,
    start: usize,
}

impl<'a> Call<'a> {
    /// `None` where these kernels do not serve: other widths, tensors of f32 on a GPU that may not round them, and sizes whose rows cannot
    /// be numbered in 32 bits, or divided by the group with a reciprocal that is exact.
    pub(super) fn new(gpu: &'a Arc<Gpu>, dims: &'a Dims, dtype: DType, start: usize) -> Option<Self> {
        let width = [&WIDTH_64, &WIDTH_128].into_iter().find(|width| width.head_dim == dims.d)?;
        let may_round = gpu.precision() == Precision::Bf16 || dtype == DType::Bf16;
        let group = dims.group();
        // Queries, keys and values may be rows of one matrix.
        let numbered = 3 * dims.b * dims.t * dims.h < 1 << 32 && dims.b * dims.s * dims.g < 1 << 32 && dims.t * group * group < 1 << 31;
        (may_round && numbered).then_some(Self { gpu, width, dims, start })
    }

    /// A kernel whose blocks have `warpgroups` tiles of the `n` rows (or keys) of a sequence and KV head.
    fn launch(&self, name: &str, n: usize, warpgroups: usize, row_tiles: usize, key_tiles: usize, floats: usize, args: &[Arg]) {
        let Dims { b, t, s, g, .. } = *self.dims;
        let group = self.dims.group() as u64;
        let int = |x: usize| Arg::I32(x as i32);
        let reciprocal = Arg::U32(if group > 1 { ((1u64 << 32) / group + 1) as u32 } else { 0 });
        let sizes = [int(t), int(s), int(g), int(self.start), int(group as usize), reciprocal];
        let args: Vec<Arg> = args.iter().copied().chain(sizes).collect();
        let tiles = row_tiles * warpgroups + key_tiles;
        let shared = tiles * TILE * self.dims.d * 2 + 4 * floats;
        let grid = [b * g, n.div_ceil(warpgroups * TILE), 1];
        // SAFETY: shapes were checked by the caller; `lens` keeps queries within `t` and keys within `s`.
        unsafe { launch(self.gpu, &self.width.source, name, grid, 128 * warpgroups as u32, shared as u32, &args) };
    }

    fn bf16(&self, shape: &[usize]) -> Tensor {
        Tensor::empty_on(self.gpu, shape, DType::Bf16)
    }

    /// `(o [B, T, H, D], lse [B, T, H])`.
    pub(super) fn fwd(&self, q: &Tensor, k: &Tensor, v: &Tensor, lens: &Buffer) -> (Tensor, Tensor) {
        let [q16, k16, v16] = [q, k, v].map(|x| x.to_dtype(DType::Bf16));
        let (o, lse) = self.forward([act(&q16), act(&k16), act(&v16)], 1, lens);
        (o.to_dtype(q.dtype()), lse)
    }

    /// `o [B, T, H, D]` of `qkv [B, T, 3, H, D]`.
    pub(super) fn fwd_packed(&self, qkv: &Tensor, lens: &Buffer) -> Tensor {
        let qkv16 = qkv.to_dtype(DType::Bf16);
        let third = (self.dims.h * self.dims.d * DType::Bf16.size()) as u64;
        let factors = [0, 1, 2].map(|i| Arg::U64(qkv16.address() + i * third));
        let o =
            if self.dims.d == 64 && self.dims.t <= SHORT { self.forward_short(factors, lens) } else { self.forward(factors, 3, lens).0 };
        o.to_dtype(qkv.dtype())
    }

    /// `o` of an encoder's heads of 64 over few tokens, whose factors lie in `[B, T, 3, H, D]`.
    fn forward_short(&self, [q, k, v]: [Arg; 3], lens: &Buffer) -> Tensor {
        let Dims { b, t, h, d, .. } = *self.dims;
        let mut o = self.bf16(&[b, t, h, d]);
        let sizes = [3 * h, b, t, h].map(|x| Arg::I32(x as i32));
        let args: Vec<Arg> = [q, k, v, lens.into(), act_mut(&mut o)].into_iter().chain(sizes).collect();
        // Two stages of queries, keys and values; two blocks a multiprocessor stay for all heads.
        let shared = 2 * 3 * SHORT * d * DType::Bf16.size();
        let blocks = (b * h).min(2 * self.gpu.info().multiprocessors as usize);
        // SAFETY: as in `launch`.
        unsafe { launch(self.gpu, &SHORT_64, "short_bf16_fwd", [blocks, 1, 1], 256, shared as u32, &args) };
        o
    }

    /// `rows`: of a token in what the factors lie in.
    fn forward(&self, [q, k, v]: [Arg; 3], rows: i32, lens: &Buffer) -> (Tensor, Tensor) {
        let Dims { b, t, h, d, .. } = *self.dims;
        let (mut o, mut lse) = (self.bf16(&[b, t, h, d]), output(self.gpu, [b, t, h]));
        let args = [q, k, v, lens.into(), act_mut(&mut o), (&mut lse).into(), rows.into()];
        self.launch("dense_bf16_fwd", t * self.dims.group(), self.width.fwd, 1, 4, 0, &args);
        (o, lse)
    }

    /// `(dq, dk, dv)`.
    pub(super) fn bwd(&self, [dout, q, k, v, o, lse]: [&Tensor; 6], lens: &Buffer) -> (Tensor, Tensor, Tensor) {
        let (mut dq, mut delta) = (self.bf16(q.shape()), output(self.gpu, lse.shape()));
        let (mut dk, mut dv) = (self.bf16(k.shape()), self.bf16(v.shape()));
        let dtype = q.dtype();
        let [dout, q, k, v, o] = [dout, q, k, v, o].map(|x| x.to_dtype(DType::Bf16));
        let factors: [Arg; 4] = [act(&dout), act(&q), act(&k), act(&v)];
        let Width { dq: at_dq, dkv: at_dkv, .. } = *self.width;

        let rest: [Arg; 5] = [act(&o), lse.into(), lens.into(), act_mut(&mut dq), (&mut delta).into()];
        let args: Vec<Arg> = factors.into_iter().chain(rest).collect();
        self.launch("dense_bf16_dq", self.dims.t * self.dims.group(), at_dq, 2, 5, TILE * at_dq, &args);

        let rest: [Arg; 5] = [lse.into(), (&delta).into(), lens.into(), act_mut(&mut dk), act_mut(&mut dv)];
        let args: Vec<Arg> = factors.into_iter().chain(rest).collect();
        self.launch("dense_bf16_dkv", self.dims.s, at_dkv, 2, 4, 4 * TILE, &args);
        (dq.to_dtype(dtype), dk.to_dtype(dtype), dv.to_dtype(dtype))
    }
}
