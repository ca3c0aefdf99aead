//! Dense attention that never holds `[T, S]`: the causal one of teachers, the baseline of routed attention, and the one of encoders.
//!
//! ```text
//! z_tj = q_t . k_j / sqrt(D)   for j in 0..=start + t (an encoder: j in 0..lens[b])      o_t = sum_j softmax(z_t)_j v_j      lse_t = log sum_j exp z_tj
//! ```
//!
//! Shapes: `q, o [B, T, H, D]`, `k, v [B, S, G, D]`, `lse [B, T, H]`; head `h` reads KV head `h / (H / G)`.
//! A padding row (`t >= lens[b]`) has `o = 0`, `lse = -inf` and no gradient; rows of `k` and `v` that no
//! valid query sees are never read. Time is quadratic in `T`, memory linear.
//!
//! On a GPU: in precision bf16 (or for tensors in bf16) heads of 64 and 128 run on tensor cores, factors of products rounded to bf16 and
//! results in the format of `q`. An encoder's forward pass with heads of 32 or 64 otherwise has factors rounded to TF32, unless the precision is f32. Everything else is
//! f32 on the plain cores, gradients of an encoder's attention among it.

pub(crate) mod cases;
mod cpu;
mod cuda;
pub mod naive;
mod tensor_cores;
#[cfg(test)]
mod tests;
mod whole_tf32;

use sluice_tensor::cuda::Buffer;
use sluice_tensor::{Device, Tensor};

use crate::routed_attention::Dims;
use crate::routed_attention::gpu_routing::upload_lens;

/// As `start`: every query sees every valid key of its sequence, `0..lens[b]`. Larger than any position.
const WHOLE: usize = 1 << 30;

/// Attention of an encoder, where `S = T`: every query sees `0..lens[b]`. Returns `(o [B, T, H, D], lse [B, T, H])`.
#[track_caller]
pub fn fwd_bidirectional(q: &Tensor, k: &Tensor, v: &Tensor, lens: &[usize]) -> (Tensor, Tensor) {
    fwd(q, k, v, WHOLE, lens)
}

/// Lengths of the texts of a batch on the device of its layers: one copy for all of them.
pub struct Lens {
    lens: Vec<usize>,
    /// `[B]` i32 on a GPU.
    there: Option<Buffer>,
}

impl Lens {
    /// Lengths for tensors on `device`.
    pub fn new(lens: &[usize], device: &Device) -> Self {
        Self { lens: lens.to_vec(), there: device.gpu().map(|gpu| upload_lens(gpu, lens)) }
    }
}

/// [`fwd_bidirectional`] of queries, keys and values that one product made, `qkv [B, T, 3, H, D]`: `o [B, T, H, D]`. For inference.
#[track_caller]
pub fn fwd_packed(qkv: &Tensor, lens: &Lens) -> Tensor {
    let [b, t, three, h, d] = qkv.dims();
    assert!(
        three == 3 && lens.lens.len() == b && lens.lens.iter().all(|&n| n <= t),
        "dense_attention::fwd_packed of {:?} with lengths {:?}",
        qkv.shape(),
        lens.lens
    );
    let dims = Dims { b, t, s: t, h, g: h, d };
    if let Some(gpu) = qkv.gpu() {
        let there = lens.there.as_ref().expect("lengths are where the tensors are");
        if let Some(o) = cuda::fwd_packed(gpu, &dims, qkv, there) {
            return o;
        }
    }
    let [q, k, v] = unpack(qkv);
    fwd_bidirectional(&q, &k, &v, &lens.lens).0
}

/// The three parts, `[B, T, H, D]` each, of `qkv [B, T, 3, H, D]`.
#[track_caller]
pub fn unpack(qkv: &Tensor) -> [Tensor; 3] {
    let [b, t, three, h, d] = qkv.dims();
    assert_eq!(three, 3, "unpacking {:?}", qkv.shape());
    let n = h * d;
    let parts = match qkv.gpu() {
        Some(gpu) => cuda::unpack(gpu, qkv, b * t, n),
        None => [0, 1, 2].map(|i| {
            let rows = qkv.f32().chunks_exact(3 * n.max(1));
            Tensor::from_vec(rows.flat_map(|row| &row[i * n..(i + 1) * n]).copied().collect(), [b * t, n])
        }),
    };
    parts.map(|part| part.reshape([b, t, h, d]))
}

/// Gradients `(dq, dk, dv)` from `dout [B, T, H, D]` and the results `o`, `lse` of [`fwd_bidirectional`] on the same inputs.
#[track_caller]
pub fn bwd_bidirectional(
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    lens: &[usize],
) -> (Tensor, Tensor, Tensor) {
    bwd(dout, q, k, v, o, lse, WHOLE, lens)
}

/// Query `i` of the tensor stands at position `start + i`. Returns `(o [B, T, H, D], lse [B, T, H])`.
#[track_caller]
pub fn fwd(q: &Tensor, k: &Tensor, v: &Tensor, start: usize, lens: &[usize]) -> (Tensor, Tensor) {
    let dims = check("dense_attention::fwd", q, k, v, start, lens);
    if let Some(gpu) = q.gpu() {
        return cuda::fwd(gpu, &dims, q, k, v, start, lens);
    }
    cpu::fwd(&dims, q, k, v, start, lens)
}

/// Gradients `(dq, dk, dv)` from `dout [B, T, H, D]` and the results `o`, `lse` of [`fwd`] on the same inputs.
#[track_caller]
pub fn bwd(
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    start: usize,
    lens: &[usize],
) -> (Tensor, Tensor, Tensor) {
    let dims = check("dense_attention::bwd", q, k, v, start, lens);
    assert_eq!(dout.shape(), q.shape(), "dense_attention::bwd: dout against q");
    assert_eq!(o.shape(), q.shape(), "dense_attention::bwd: o against q");
    assert_eq!(lse.shape(), &q.shape()[..3], "dense_attention::bwd: lse against q {:?}", q.shape());
    if let Some(gpu) = q.gpu() {
        return cuda::bwd(gpu, &dims, [dout, q, k, v, o, lse], start, lens);
    }
    cpu::bwd(&dims, dout, q, k, v, o, lse, start, lens)
}

#[track_caller]
fn check(op: &str, q: &Tensor, k: &Tensor, v: &Tensor, start: usize, lens: &[usize]) -> Dims {
    let dims = Dims::of(op, q, k, v, lens);
    if start == WHOLE {
        assert_eq!(dims.t, dims.s, "{op}: {} queries and {} keys of encoders", dims.t, dims.s);
        return dims;
    }
    let longest = lens.iter().copied().max().unwrap_or(0);
    assert!(longest == 0 || start + longest <= dims.s, "{op}: {longest} queries from position {start} but {} keys", dims.s);
    dims
}
