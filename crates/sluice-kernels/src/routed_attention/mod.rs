//! Attention of each query to its routed keys and its local window, in one softmax.
//!
//! Which keys are routed is decided elsewhere and arrives as a [`Routing`]: this module holds no policy.
//!
//! ```text
//! z_tj = q_t . k_j / sqrt(D) + beta_bj      j in R_b and in the local range of t, b = block of t
//! a_t  = softmax_j z_tj                     o_t = sum_j a_tj v_j         lse_t = log sum_j exp z_tj
//! beta_bj = log sigmoid((s_j - tau_b) / T_g) on routed keys outside the local range, 0 inside it
//! ```
//!
//! Shapes: `q, o [B, T, H, D]`, `k, v [B, S, G, D]`, `lse [B, T, H]`, gate scores `[B, S, G]`; head `h` reads
//! KV head `h / (H / G)`. A padding row (`t >= lens[b]`) and a row without keys have `o = 0`, `lse = -inf` and
//! no gradient. Rows of `k` and `v` that no valid query sees are never read. Time and memory are linear in `T`.
//!
//! On a GPU, from position 0: causal attention with heads of 64 or 128, factors of products rounded to bf16; tensors in f32 or bf16, results
//! in the format of `q`. Bidirectional attention is forward only and without a gate bias there, with heads of up to 128; factors are rounded
//! to bf16 or TF32 where the precision allows it and a kernel on tensor cores has the width (64 and 128, or 32 and 64), and are f32 otherwise.
//! A [`Routing`] in main memory is copied there first; the `_on_gpu` functions take one that is there.

mod bidirectional;
pub(crate) mod cases;
mod cpu;
mod cuda;
pub(crate) mod gpu_routing;
pub mod naive;
mod one_pass;
mod placed;
mod routing;
#[cfg(test)]
mod tests;
mod tiles;

use sluice_tensor::Tensor;

use crate::dense_attention;
use crate::top_k_routing::Budget;

pub use gpu_routing::GpuRouting;
pub use placed::PlacedRouting;
pub use routing::{Routing, Visibility};

/// Gate scores that bias the logits of routed keys, the path by which a hard top-k is trained.
#[derive(Clone, Copy)]
pub struct GateBias<'a> {
    /// `[B, S, G]`, in the rows of the keys.
    pub scores: &'a Tensor,
    /// `T_g > 0`.
    pub temperature: f32,
}

impl GateBias<'_> {
    /// `beta` of a routed key and its derivative by the score. A score of +inf (a sink) and a block
    /// that has not filled its budget (`tau` = -inf) have none.
    pub fn of(score: f32, tau: f32, temperature: f32) -> (f32, f32) {
        if score == f32::INFINITY || tau == f32::NEG_INFINITY {
            return (0.0, 0.0);
        }
        let x = (score - tau) / temperature;
        // log sigmoid(x) without overflow on either side.
        let e = (-x.abs()).exp();
        let beta = x.min(0.0) - e.ln_1p();
        let sigmoid_of_minus_x = if x >= 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) };
        (beta, sigmoid_of_minus_x / temperature)
    }
}

/// What [`bwd`] returns.
pub struct RoutedGrads {
    /// `[B, T, H, D]`.
    pub dq: Tensor,
    /// `[B, S, G, D]`.
    pub dk: Tensor,
    /// `[B, S, G, D]`.
    pub dv: Tensor,
    /// `[B, S, G]`, when there was a gate bias.
    pub dscores: Option<Tensor>,
}

/// Returns `(o [B, T, H, D], lse [B, T, H])`.
#[track_caller]
pub fn fwd(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<GateBias<'_>>, routing: &Routing) -> (Tensor, Tensor) {
    let dims = check("routed_attention::fwd", q, k, v, bias, routing);
    if let Some(gpu) = q.gpu() {
        return cuda::fwd(gpu, &dims, [q, k, v], bias, &GpuRouting::upload(gpu, routing));
    }
    cpu::fwd(&dims, q, k, v, bias, routing)
}

/// Gradients from `dout [B, T, H, D]` and the results `o`, `lse` of [`fwd`] on the same inputs.
#[track_caller]
pub fn bwd(
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    bias: Option<GateBias<'_>>,
    routing: &Routing,
) -> RoutedGrads {
    let dims = check("routed_attention::bwd", q, k, v, bias, routing);
    check_results("routed_attention::bwd", q, dout, o, lse);
    if let Some(gpu) = q.gpu() {
        return cuda::bwd(gpu, &dims, [dout, q, k, v, o, lse], bias, &GpuRouting::upload(gpu, routing));
    }
    cpu::bwd(&dims, dout, q, k, v, o, lse, bias, routing)
}

/// [`fwd`] with a routing that is on the GPU of the tensors.
#[track_caller]
pub fn fwd_on_gpu(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<GateBias<'_>>, routing: &GpuRouting) -> (Tensor, Tensor) {
    let dims = check_on_gpu("routed_attention::fwd_on_gpu", q, k, v, bias, routing);
    cuda::fwd(routing.indices.gpu(), &dims, [q, k, v], bias, routing)
}

/// [`bwd`] with a routing that is on the GPU of the tensors.
#[track_caller]
pub fn bwd_on_gpu(
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    bias: Option<GateBias<'_>>,
    routing: &GpuRouting,
) -> RoutedGrads {
    let dims = check_on_gpu("routed_attention::bwd_on_gpu", q, k, v, bias, routing);
    check_results("routed_attention::bwd_on_gpu", q, dout, o, lse);
    cuda::bwd(routing.indices.gpu(), &dims, [dout, q, k, v, o, lse], bias, routing)
}

/// [`fwd`] of queries, keys and values that one product made, `qkv [B, T, 3, H, D]`, without `lse`: `o [B, T, H, D]`. For inference of
/// encoders, whose kernel on a GPU reads the three as they lie.
#[track_caller]
pub fn fwd_packed(qkv: &Tensor, routing: &PlacedRouting) -> Tensor {
    if let PlacedRouting::Gpu(routing) = routing
        && routing.visibility == Visibility::Bidirectional
    {
        let [b, t, three, h, d] = qkv.dims();
        assert_eq!(three, 3, "routed_attention::fwd_packed of {:?}", qkv.shape());
        let dims = Dims { b, t, s: t, h, g: h, d };
        check_routing_on_gpu("routed_attention::fwd_packed", &dims, routing);
        return bidirectional::fwd_packed(routing.indices.gpu(), &dims, qkv, routing);
    }
    let [q, k, v] = dense_attention::unpack(qkv);
    routing.fwd(&q, &k, &v, None).0
}

/// Bytes that [`bwd_on_gpu`] holds beside its inputs and results, for `k [B, T, G, D]` and a routing by top-k: sums of what the readers of a
/// routed key contribute.
pub fn gpu_scratch_bytes(k_shape: [usize; 4], budget: &Budget) -> usize {
    cuda::scratch_bytes(k_shape, budget)
}

/// Shapes alone: what a router on the GPU chose is not read back.
#[track_caller]
fn check_on_gpu(op: &str, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<GateBias<'_>>, routing: &GpuRouting) -> Dims {
    let dims = Dims::of(op, q, k, v, &routing.lens);
    check_routing_on_gpu(op, &dims, routing);
    if let Some(bias) = bias {
        assert_eq!(bias.scores.shape(), [dims.b, dims.s, dims.g], "{op}: gate scores for k {:?}", k.shape());
        assert!(bias.temperature > 0.0, "{op}: gate temperature {}; without a bias pass None", bias.temperature);
    }
    dims
}

#[track_caller]
fn check_routing_on_gpu(op: &str, dims: &Dims, routing: &GpuRouting) {
    let Dims { b, t, g, .. } = *dims;
    let n_blocks = match routing.visibility {
        Visibility::Causal => t.div_ceil(routing.route_every),
        Visibility::Bidirectional => 1,
    };
    assert!(
        routing.batch == b && routing.n_kv_heads == g && routing.n_blocks == n_blocks && routing.lens.iter().all(|&n| n <= t),
        "{op}: routing of batch {}, {} KV heads and {} blocks of {} for {dims:?}",
        routing.batch,
        routing.n_kv_heads,
        routing.n_blocks,
        routing.route_every
    );
}

/// The `dscores` of [`bwd`] alone, on a CPU at two fifths of its products: for training gates while everything else is frozen.
/// On a GPU it takes all of them.
#[track_caller]
pub fn bwd_scores(
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    bias: GateBias<'_>,
    routing: &Routing,
) -> Tensor {
    let dims = check("routed_attention::bwd_scores", q, k, v, Some(bias), routing);
    check_results("routed_attention::bwd_scores", q, dout, o, lse);
    if let Some(gpu) = q.gpu() {
        let grads = cuda::bwd(gpu, &dims, [dout, q, k, v, o, lse], Some(bias), &GpuRouting::upload(gpu, routing));
        return grads.dscores.expect("there is a bias");
    }
    cpu::bwd_scores(&dims, dout, q, k, v, o, lse, bias, routing)
}

/// [`bwd_scores`] with a routing that is on the GPU of the tensors.
#[track_caller]
pub fn bwd_scores_on_gpu(
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    bias: GateBias<'_>,
    routing: &GpuRouting,
) -> Tensor {
    bwd_on_gpu(dout, q, k, v, o, lse, Some(bias), routing).dscores.expect("there is a bias")
}

#[track_caller]
fn check_results(op: &str, q: &Tensor, dout: &Tensor, o: &Tensor, lse: &Tensor) {
    assert_eq!(dout.shape(), q.shape(), "{op}: dout against q");
    assert_eq!(o.shape(), q.shape(), "{op}: o against q");
    assert_eq!(lse.shape(), &q.shape()[..3], "{op}: lse against q {:?}", q.shape());
}

/// Sizes of an attention call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dims {
    pub(crate) b: usize,
    pub(crate) t: usize,
    pub(crate) s: usize,
    pub(crate) h: usize,
    pub(crate) g: usize,
    pub(crate) d: usize,
}

impl Dims {
    #[track_caller]
    pub(crate) fn of(op: &str, q: &Tensor, k: &Tensor, v: &Tensor, lens: &[usize]) -> Self {
        let [b, t, h, d] = q.dims();
        let [kb, s, g, kd] = k.dims();
        assert!(kb == b && kd == d, "{op}: q {:?} and k {:?} differ in batch or head width", q.shape(), k.shape());
        assert_eq!(k.shape(), v.shape(), "{op}: k against v");
        assert!(g > 0 && h % g == 0, "{op}: {h} query heads do not divide among {g} KV heads");
        assert!(lens.len() == b && lens.iter().all(|&n| n <= t), "{op}: lens {lens:?} for q {:?}", q.shape());
        Self { b, t, s, h, g, d }
    }

    /// Query heads per KV head.
    pub(crate) fn group(&self) -> usize {
        self.h / self.g
    }

    /// Softmax scale.
    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.d as f32).sqrt()
    }
}

/// Everything the kernels rely on, so that they need not look again.
#[track_caller]
fn check(op: &str, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<GateBias<'_>>, routing: &Routing) -> Dims {
    let dims = Dims::of(op, q, k, v, &routing.lens);
    let Dims { b, s, g, .. } = dims;
    let Routing { n_blocks, n_routed, start, key_offset, .. } = *routing;
    assert!(
        routing.batch == b && routing.n_kv_heads == g,
        "{op}: routing of batch {} and {} KV heads for k {:?}",
        routing.batch,
        routing.n_kv_heads,
        k.shape()
    );
    assert_eq!(routing.indices.len(), b * n_blocks * g * n_routed, "{op}: indices for [{b}, {n_blocks}, {g}, {n_routed}]");
    assert_eq!(routing.tau.len(), b * n_blocks * g, "{op}: tau for [{b}, {n_blocks}, {g}]");
    if let Some(bias) = bias {
        assert_eq!(bias.scores.shape(), [b, s, g], "{op}: gate scores for k {:?}", k.shape());
        assert!(bias.temperature > 0.0, "{op}: gate temperature {}; without a bias pass None", bias.temperature);
    }
    let longest = routing.lens.iter().copied().max().unwrap_or(0);
    if longest == 0 {
        return dims;
    }
    match routing.visibility {
        Visibility::Causal => {
            assert!(routing.route_every > 0, "{op}: route_every is 0");
            let need = routing.block_of(longest - 1) + 1;
            assert!(n_blocks >= need, "{op}: {n_blocks} blocks of routing for {longest} queries from position {start}, {need} needed");
            let first = routing.first_local(0);
            assert!(first >= key_offset, "{op}: local position {first} lies before key_offset {key_offset}");
            assert!(
                start + longest - key_offset <= s,
                "{op}: the key of position {} is not among {s} rows from {key_offset}",
                start + longest - 1
            );
        }
        Visibility::Bidirectional => {
            assert!(start == 0 && key_offset == 0 && n_blocks == 1, "{op}: bidirectional attention has one block and starts at 0");
            assert!(longest <= s, "{op}: {longest} queries but {s} keys");
        }
    }
    for (at, row) in routing.indices.chunks_exact(n_routed.max(1)).enumerate() {
        let block = at / g % n_blocks;
        // Local rows of a causal block; a routed key among them would be counted twice.
        let local = match routing.visibility {
            Visibility::Causal => {
                let begin = (start / routing.route_every + block) * routing.route_every;
                let end = (begin + routing.route_every).min(start + longest);
                (begin + 1).saturating_sub(routing.window).saturating_sub(key_offset)..end.saturating_sub(key_offset)
            }
            Visibility::Bidirectional => 0..0,
        };
        for &i in row.iter().take_while(|&&i| i >= 0) {
            let i = i as usize;
            assert!(i < s, "{op}: routed row {i} of {s}");
            assert!(!local.contains(&i), "{op}: row {i} is routed and local {local:?} in block {block}");
        }
    }
    dims
}
