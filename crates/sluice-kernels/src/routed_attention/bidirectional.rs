//! Launches of `bidirectional_bf16.cu`, `bidirectional_tf32.cu` and `bidirectional_f32.cu`: the forward pass of an encoder's attention, sums and
//! softmax in f32.

use std::sync::Arc;

use sluice_tensor::cuda::{Arg, Gpu, KernelSource, Precision};
use sluice_tensor::{DType, Tensor};

use super::{Dims, GpuRouting};
use crate::launch::{launch, output};

macro_rules! source {
    ($factors:literal, $head_dim:literal, $($file:literal),+) => {
        KernelSource {
            name: concat!("routed_bidirectional_", $factors, "_", $head_dim),
            code: concat!(
                "#define HEAD_DIM ", $head_dim $(, "\n", include_str!($file))+, "\n",
                include_str!("slots.cuh"), "\n",
                include_str!(concat!("bidirectional_", $factors, ".cu"))
            ),
        }
    };
}

macro_rules! bf16 {
    ($head_dim:literal) => {
        source!("bf16", $head_dim, "../attention_tile/tile.cuh", "../attention_tile/walk.cuh")
    };
}

/// A kernel and what a launch must know of it.
struct Kernel {
    source: KernelSource,
    /// Width of a head, in f32 of the widest.
    head_dim: usize,
    /// What factors are: bf16, or f32 rounded to TF32 or not at all.
    factors: Precision,
    /// Rows of a tile: in bf16 queries times the heads of a KV head, otherwise queries.
    rows: usize,
}

/// The first that serves is taken.
static KERNELS: [Kernel; 6] = [
    Kernel { source: bf16!("64"), head_dim: 64, factors: Precision::Bf16, rows: 128 },
    Kernel { source: bf16!("128"), head_dim: 128, factors: Precision::Bf16, rows: 192 },
    Kernel { source: source!("tf32", "32", "../attention_tile/walk_tf32.cuh"), head_dim: 32, factors: Precision::Tf32, rows: 64 },
    Kernel { source: source!("tf32", "64", "../attention_tile/walk_tf32.cuh"), head_dim: 64, factors: Precision::Tf32, rows: 64 },
    Kernel { source: source!("f32", "64", "../attention_tile/walk_f32.cuh"), head_dim: 64, factors: Precision::F32, rows: 64 },
    Kernel { source: source!("f32", "128", "../attention_tile/walk_f32.cuh"), head_dim: 128, factors: Precision::F32, rows: 64 },
];

/// Keys of a step.
const KEYS: usize = 64;

/// `(o [B, T, H, D], lse [B, T, H])`; `o` in the format of `q`.
#[track_caller]
pub(super) fn fwd(gpu: &Arc<Gpu>, dims: &Dims, [q, k, v]: [&Tensor; 3], routing: &GpuRouting) -> (Tensor, Tensor) {
    assert_eq!(dims.t, dims.s, "bidirectional routed attention on the GPU: {} queries and {} keys", dims.t, dims.s);
    let kernel = Kernel::of(gpu, dims, q.dtype());
    let factors = [q, k, v].map(|x| x.to_dtype(kernel.format()));
    let (o, lse) = kernel.run(gpu, dims, factors.each_ref().map(Tensor::address), 1, routing);
    (o.to_dtype(q.dtype()), lse)
}

/// `o` of `qkv [B, T, 3, H, D]`, in its format.
#[track_caller]
pub(super) fn fwd_packed(gpu: &Arc<Gpu>, dims: &Dims, qkv: &Tensor, routing: &GpuRouting) -> Tensor {
    let kernel = Kernel::of(gpu, dims, qkv.dtype());
    let factors = qkv.to_dtype(kernel.format());
    let third = (dims.h * dims.d * kernel.format().size()) as u64;
    let addresses = [0, 1, 2].map(|i| factors.address() + i * third);
    kernel.run(gpu, dims, addresses, 3, routing).0.to_dtype(qkv.dtype())
}

impl Kernel {
    #[track_caller]
    fn of(gpu: &Gpu, dims: &Dims, dtype: DType) -> &'static Self {
        let serves = |kernel: &&Kernel| match kernel.factors {
            Precision::Bf16 => kernel.head_dim == dims.d && (gpu.precision() == Precision::Bf16 || dtype == DType::Bf16),
            Precision::Tf32 => kernel.head_dim == dims.d && gpu.precision() != Precision::F32,
            Precision::F32 => dims.d <= kernel.head_dim,
        };
        let found = KERNELS.iter().find(serves);
        found.unwrap_or_else(|| panic!("bidirectional routed attention on the GPU serves heads of up to 128, found {}", dims.d))
    }

    /// What tensors come and go in.
    fn format(&self) -> DType {
        self.factors.activations()
    }

    /// `rows`: of a token in what the factors lie in, 3 for `[B, T, 3, H, D]`.
    #[track_caller]
    fn run(&self, gpu: &Arc<Gpu>, dims: &Dims, factors: [u64; 3], rows: usize, routing: &GpuRouting) -> (Tensor, Tensor) {
        let Dims { b, t, h, g, d, .. } = *dims;
        // Rows of q, k and v are numbered in 32 bits, and divided by the group with a reciprocal that is exact up to here.
        let group = dims.group();
        assert!(
            rows * b * t * h < 1 << 32 && t * group * group < 1 << 31,
            "bidirectional routed attention on the GPU: {dims:?} is too large"
        );
        // A wider window sees nothing more.
        let (window, n_places) = (routing.window.min(2 * t + 1), routing.n_routed);
        let most_steps = (t.min(self.rows + window) + n_places).div_ceil(KEYS);
        let (mut o, mut lse) = (Tensor::empty_on(gpu, [b, t, h, d], self.format()), output(gpu, [b, t, h]));
        let mut args: Vec<Arg> = factors.map(Arg::U64).into();
        args.extend([(&routing.indices).into(), (&routing.lens_there).into(), Arg::U64(o.address_mut()), (&mut lse).into()]);
        let ints = |args: &mut Vec<Arg>, ints: &[usize]| args.extend(ints.iter().map(|&x| Arg::I32(x as i32)));
        // Sequences and heads of a tile, tiles, threads, and bytes of the tiles in shared memory.
        let (heads, tiles, threads, bytes) = match self.factors {
            Precision::Bf16 => {
                ints(&mut args, &[rows, t, g, n_places, window, most_steps, group]);
                args.push(Arg::U32(if group > 1 { ((1u64 << 32) / group as u64 + 1) as u32 } else { 0 }));
                (g, (t * group).div_ceil(self.rows), 2 * self.rows, (self.rows + 4 * KEYS) * d * 2)
            }
            Precision::Tf32 => {
                ints(&mut args, &[t, h, g, rows * h, rows * g, n_places, window, most_steps]);
                (h, t.div_ceil(self.rows), 128, 4 * 4 * KEYS * (d + 4))
            }
            Precision::F32 => {
                ints(&mut args, &[t, h, g, rows * h, rows * g, n_places, window, most_steps, d]);
                (h, t.div_ceil(self.rows), 256, 4 * ((self.rows + KEYS) * (self.head_dim + 1) + self.rows * (KEYS + 1)))
            }
        };
        let shared = bytes + 8 * most_steps + 4 * n_places;
        // SAFETY: shapes were checked by the caller; routed rows and `lens` lie within `t`.
        unsafe { launch(gpu, &self.source, "routed_bidirectional_fwd", [b * heads, tiles, 1], threads as u32, shared as u32, &args) };
        (o, lse)
    }
}
