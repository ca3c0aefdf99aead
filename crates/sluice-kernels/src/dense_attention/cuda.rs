//! Tensor cores where they serve (`tensor_cores.rs` in bf16, `whole_tf32.rs` for encoders in TF32); otherwise tiles of up to 64 x 64 in shared memory, f32 throughout.

use std::sync::Arc;

use sluice_tensor::cuda::{Arg, Buffer, Gpu, KernelSource, or_raise};
use sluice_tensor::{DType, Tensor};

use super::WHOLE;
use super::tensor_cores::Call;
use super::whole_tf32;
use crate::launch::{THREADS, act, act_mut, formats, of_format, output, over_elements, over_rows, run};
use crate::routed_attention::Dims;
use crate::routed_attention::gpu_routing::upload_lens;

const SOURCE: KernelSource = KernelSource {
    name: "dense_attention",
    code: concat!(include_str!("../attention_tile/walk_f32.cuh"), "\n", include_str!("dense_attention.cu")),
};

static UNPACK: [KernelSource; 2] = formats!("unpack", "unpack.cu");

/// Widest head that the tiles fit.
const WIDEST: usize = 128;

/// Tile of one kernel at one head width: width, queries, keys.
struct Tile(usize, usize, usize);

impl Tile {
    /// Bytes of shared memory: some rows of the head width and of the keys, each with one element of padding, and two numbers per query.
    fn shared(&self, wide_rows: usize) -> u32 {
        let Self(width, queries, keys) = self;
        (4 * (wide_rows * (width + 1) + queries * (keys + 1) + 2 * queries)) as u32
    }
}

fn is_narrow(dims: &Dims) -> bool {
    assert!(dims.d <= WIDEST, "dense attention on the GPU serves heads of up to {WIDEST}, found {}", dims.d);
    dims.d <= 64
}

fn sizes(dims: &Dims, start: usize) -> [Arg; 6] {
    [dims.t, dims.s, dims.h, dims.g, dims.d, start].map(|x| Arg::U32(x as u32))
}

/// # Safety
/// As for [`Gpu::launch`].
unsafe fn tiled(gpu: &Gpu, name: &str, grid: [usize; 3], shared: u32, args: &[Arg]) {
    let function = or_raise(gpu.function(&SOURCE, name));
    or_raise(gpu.allow_shared_memory(function, shared));
    // SAFETY: the caller's promise.
    or_raise(unsafe { gpu.launch(function, grid.map(|x| x as u32), [THREADS, 1, 1], shared, args) });
}

pub(super) fn fwd(gpu: &Arc<Gpu>, dims: &Dims, q: &Tensor, k: &Tensor, v: &Tensor, start: usize, lens: &[usize]) -> (Tensor, Tensor) {
    let lens = &upload_lens(gpu, lens);
    if let Some(call) = Call::new(gpu, dims, q.dtype(), start) {
        return call.fwd(q, k, v, lens);
    }
    let dtype = q.dtype();
    let [q, k, v] = &[q, k, v].map(|x| x.to_dtype(DType::F32));
    if whole_tf32::serves(gpu, dims, start) {
        let (o, lse) = whole_tf32::fwd(gpu, dims, [q, k, v].map(Arg::from), 1, lens);
        return (o.to_dtype(dtype), lse);
    }
    let (name, tile) = if is_narrow(dims) { ("forward_64", Tile(64, 64, 64)) } else { ("forward_128", Tile(128, 64, 64)) };
    let (mut o, mut lse) = (output(gpu, q.shape()), output(gpu, &q.shape()[..3]));
    let mut args = vec![q.into(), k.into(), v.into(), lens.into(), (&mut o).into(), (&mut lse).into()];
    args.extend(sizes(dims, start));
    let grid = [dims.t.div_ceil(tile.1), dims.h, dims.b];
    // SAFETY: shapes were checked by the caller; `lens` keeps queries within `t` and keys within `s`.
    unsafe { tiled(gpu, name, grid, tile.shared(tile.1 + tile.2), &args) };
    (o.to_dtype(dtype), lse)
}

/// [`fwd`] of an encoder without `lse`, where kernels read the three as they lie in `qkv [B, T, 3, H, D]`.
pub(super) fn fwd_packed(gpu: &Arc<Gpu>, dims: &Dims, qkv: &Tensor, lens: &Buffer) -> Option<Tensor> {
    if let Some(call) = Call::new(gpu, dims, qkv.dtype(), WHOLE) {
        return Some(call.fwd_packed(qkv, lens));
    }
    whole_tf32::serves(gpu, dims, WHOLE).then(|| {
        let wide = qkv.to_dtype(DType::F32);
        let third = (dims.h * dims.d * DType::F32.size()) as u64;
        let factors = [0, 1, 2].map(|i| Arg::U64(wide.address() + i * third));
        whole_tf32::fwd(gpu, dims, factors, 3, lens).0.to_dtype(qkv.dtype())
    })
}

/// `q`, `k` and `v` of `qkv` with `n` columns each.
pub(super) fn unpack(gpu: &Arc<Gpu>, qkv: &Tensor, n_rows: usize, n: usize) -> [Tensor; 3] {
    let mut parts = [0, 1, 2].map(|_| Tensor::empty_on(gpu, [n_rows, n], qkv.dtype()));
    let [a, b, c] = &mut parts;
    let args = [act(qkv), act_mut(a), act_mut(b), act_mut(c), (n_rows as u64).into(), (n as u32).into()];
    // SAFETY: `qkv` has three times the elements of each part, checked by the caller.
    unsafe { run(gpu, of_format(&UNPACK, qkv.dtype()), "unpack", over_elements(n_rows * n), &args) };
    parts
}

pub(super) fn bwd(
    gpu: &Arc<Gpu>,
    dims: &Dims,
    [dout, q, k, v, o, lse]: [&Tensor; 6],
    start: usize,
    lens: &[usize],
) -> (Tensor, Tensor, Tensor) {
    // The gradients of an encoder's attention run on the plain cores.
    let lens = &upload_lens(gpu, lens);
    if let Some(call) = Call::new(gpu, dims, q.dtype(), start).filter(|_| start != WHOLE) {
        return call.bwd([dout, q, k, v, o, lse], lens);
    }
    let dtype = q.dtype();
    let [dout, q, k, v, o, lse] = &[dout, q, k, v, o, lse].map(|x| x.to_dtype(DType::F32));
    let names = if is_narrow(dims) { ["query_gradient_64", "key_gradient_64"] } else { ["query_gradient_128", "key_gradient_128"] };
    let tiles = if is_narrow(dims) { [Tile(64, 64, 64), Tile(64, 64, 64)] } else { [Tile(128, 32, 64), Tile(128, 32, 32)] };
    let n_rows = dims.b * dims.t * dims.h;
    let (mut dq, mut dk, mut dv) = (output(gpu, q.shape()), output(gpu, k.shape()), output(gpu, v.shape()));
    let mut delta = output(gpu, lse.shape());
    // SAFETY: shapes were checked by the caller; `lens` keeps queries within `t` and keys within `s`.
    unsafe {
        let mut args = vec![dout.into(), o.into(), lens.into(), (&mut delta).into(), (n_rows as u32).into()];
        args.extend([dims.t, dims.h, dims.d].map(|x| Arg::U32(x as u32)));
        run(gpu, &SOURCE, "attention_delta", over_rows(n_rows), &args);

        let inputs: [Arg; 7] = [dout.into(), q.into(), k.into(), v.into(), lse.into(), (&delta).into(), lens.into()];
        let [tile, _] = &tiles;
        let args: Vec<Arg> = inputs.into_iter().chain([(&mut dq).into()]).chain(sizes(dims, start)).collect();
        tiled(gpu, names[0], [dims.t.div_ceil(tile.1), dims.h, dims.b], tile.shared(2 * tile.1 + tile.2), &args);

        let [_, tile] = &tiles;
        let args: Vec<Arg> = inputs.into_iter().chain([(&mut dk).into(), (&mut dv).into()]).chain(sizes(dims, start)).collect();
        tiled(gpu, names[1], [dims.s.div_ceil(tile.2), dims.g, dims.b], tile.shared(2 * tile.1 + 2 * tile.2), &args);
    }
    (dq.to_dtype(dtype), dk.to_dtype(dtype), dv.to_dtype(dtype))
}
