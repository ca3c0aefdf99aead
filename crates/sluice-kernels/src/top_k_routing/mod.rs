//! The router: gate scores in, [`Routing`] out. Plain data on both sides; knows nothing about keys,
//! values or attention.
//!
//! Block `b` holds the queries `[b r, (b+1) r)`. Its candidates are the positions before its local part,
//! `C_b = {0 .. l_b - 1}` with `l_b = max(0, b r - w + 1)`, and it keeps the `k` best of them by score,
//! ties to the larger index. The first `n_sink` positions have score +inf. Since a score never changes, what
//! was evicted never returns, and a heap that sees each candidate once ([`RouterState`]) *is* the prefix top-k.
//!
//! `tau_b` is the k-th best score of `C_b`, or -inf while `C_b` has fewer than `k` members.

pub(crate) mod cases;
mod cuda;
mod naive;
mod select;
mod stream;

#[cfg(test)]
mod tests;

pub use select::{route_bidirectional, route_bidirectional_in_place, route_blockwise};
pub use stream::{ChunkRouting, RouterState};

use rayon::prelude::*;
use sluice_tensor::Tensor;

use crate::routed_attention::{GpuRouting, PlacedRouting, Routing, Visibility};

/// How much the router may keep, and how often it decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// `w`, keys visible locally, the query's own included. At least 1.
    pub window: usize,
    /// `k`, routed keys per KV head, sinks included.
    pub top_k: usize,
    /// `r`, the router decides at multiples of this. At least 1.
    pub route_every: usize,
    /// The first positions, whose score is +inf.
    pub n_sink: usize,
}

impl Budget {
    /// `l_b`: first local position of a block, which is the number of its candidates.
    pub fn n_candidates(&self, block: usize) -> usize {
        (block * self.route_every + 1).saturating_sub(self.window)
    }

    /// Blocks that `len` positions from 0 touch.
    pub fn n_blocks(&self, len: usize) -> usize {
        len.div_ceil(self.route_every)
    }

    /// Places that a routing of `len` positions needs: `top_k`, or fewer when the text is too short to fill them.
    pub fn n_routed(&self, len: usize) -> usize {
        self.top_k.min(self.n_candidates(self.n_blocks(len).saturating_sub(1)))
    }

    #[track_caller]
    fn check(&self) {
        assert!(self.window >= 1 && self.route_every >= 1, "top_k_routing: window and route_every start at 1, found {self:?}");
    }
}

/// Causal routing of whole sequences: `scores [B, T, G]`, of which the first `lens[b]` rows are real.
///
/// `n_routed` is `top_k`, or less when no block has that many candidates. Scores on a GPU are routed there and the result
/// is read back; [`route_on_gpu`] leaves it there.
#[track_caller]
pub fn route(scores: &Tensor, lens: &[usize], budget: &Budget) -> Routing {
    if scores.gpu().is_some() {
        return route_on_gpu(scores, lens, budget).download();
    }
    let [batch, t, g] = scores.dims();
    check_lens("route", batch, t, lens);
    let mut routing = empty(batch, t, g, lens, budget);
    let (n_blocks, n_routed) = (routing.n_blocks, routing.n_routed);

    // Heads are independent, so each (sequence, head) streams through a router of its own.
    let streams: Vec<(Vec<i32>, Vec<f32>)> = (0..batch * g)
        .into_par_iter()
        .map(|i| {
            let (b, head) = (i / g, i % g);
            let column: Vec<f32> = scores.f32()[b * t * g..][..lens[b] * g].iter().skip(head).step_by(g).copied().collect();
            let (mut positions, mut tau) = (vec![-1; n_blocks * n_routed], vec![f32::NEG_INFINITY; n_blocks]);
            RouterState::new(1, *budget).advance(&column, n_routed, &mut positions, &mut tau);
            (positions, tau)
        })
        .collect();
    for (i, (positions, tau)) in streams.into_iter().enumerate() {
        let (b, head) = (i / g, i % g);
        for block in 0..n_blocks {
            let at = (b * n_blocks + block) * g + head;
            routing.indices[at * n_routed..(at + 1) * n_routed].copy_from_slice(&positions[block * n_routed..(block + 1) * n_routed]);
            routing.tau[at] = tau[block];
        }
    }
    routing
}

/// [`route`] for scores on a GPU, without waiting for it.
#[track_caller]
pub fn route_on_gpu(scores: &Tensor, lens: &[usize], budget: &Budget) -> GpuRouting {
    let [batch, t, _] = scores.dims();
    check_lens("route_on_gpu", batch, t, lens);
    budget.check();
    let gpu = scores.gpu().expect("route_on_gpu: the scores are in main memory");
    cuda::route(gpu, scores, lens, budget, Visibility::Causal)
}

/// [`route`] that leaves the routing where the scores are.
#[track_caller]
pub fn route_in_place(scores: &Tensor, lens: &[usize], budget: &Budget) -> PlacedRouting {
    match scores.gpu() {
        Some(_) => route_on_gpu(scores, lens, budget).into(),
        None => route(scores, lens, budget).into(),
    }
}

/// [`route_in_place`] that lets `overhang` more keys in, with the threshold `tau` of the budget: under a gate bias they fade
/// with their distance below it, so that training can tell which of the keys that miss the budget would have been worth keeping.
#[track_caller]
pub fn route_with_overhang(scores: &Tensor, lens: &[usize], budget: &Budget, overhang: usize) -> PlacedRouting {
    if overhang == 0 {
        return route_in_place(scores, lens, budget);
    }
    let wide = Budget { top_k: budget.top_k + overhang, ..*budget };
    match scores.gpu() {
        Some(_) => GpuRouting { tau: route_on_gpu(scores, lens, budget).tau, ..route_on_gpu(scores, lens, &wide) }.into(),
        None => Routing { tau: route(scores, lens, budget).tau, ..route(scores, lens, &wide) }.into(),
    }
}

/// The scores with +inf in the first `n_sink` positions: what the kernel's gate bias wants, since a sink has none.
/// `positions[t]` is the position of row `t` of `scores [B, T, G]`.
#[track_caller]
pub fn mark_sinks(scores: &Tensor, positions: &[u32], n_sink: usize) -> Tensor {
    with_sinks(f32::INFINITY, scores, positions, n_sink)
}

/// The backward of [`mark_sinks`]: gradients with 0 in the first `n_sink` positions.
#[track_caller]
pub fn mark_sinks_bwd(dmarked: &Tensor, positions: &[u32], n_sink: usize) -> Tensor {
    with_sinks(0.0, dmarked, positions, n_sink)
}

#[track_caller]
fn with_sinks(value: f32, x: &Tensor, positions: &[u32], n_sink: usize) -> Tensor {
    let [_, t, g] = x.dims();
    assert_eq!(t, positions.len(), "mark_sinks: rows {:?} with {} positions", x.shape(), positions.len());
    if t == 0 || positions.iter().all(|&p| (p as usize) >= n_sink) {
        return x.clone();
    }
    if let Some(gpu) = x.gpu() {
        return cuda::with_sinks(gpu, value, x, positions, n_sink);
    }
    let mut filled = x.clone();
    for (i, row) in filled.f32_mut().chunks_exact_mut(g).enumerate() {
        if (positions[i % t] as usize) < n_sink {
            row.fill(value);
        }
    }
    filled
}

/// A causal routing from position 0 that keeps nothing yet.
fn empty(batch: usize, t: usize, g: usize, lens: &[usize], budget: &Budget) -> Routing {
    budget.check();
    let (n_blocks, n_routed) = (budget.n_blocks(t), budget.n_routed(t));
    Routing {
        batch,
        n_blocks,
        n_kv_heads: g,
        n_routed,
        indices: vec![-1; batch * n_blocks * g * n_routed],
        tau: vec![f32::NEG_INFINITY; batch * n_blocks * g],
        window: budget.window,
        route_every: budget.route_every,
        start: 0,
        key_offset: 0,
        lens: lens.to_vec(),
        visibility: Visibility::Causal,
    }
}

#[track_caller]
fn check_lens(op: &str, batch: usize, t: usize, lens: &[usize]) {
    assert_eq!(lens.len(), batch, "{op}: {} lengths for {batch} sequences", lens.len());
    assert!(lens.iter().all(|&n| n <= t), "{op}: lengths {lens:?} exceed the {t} rows of a sequence");
}

/// A score as the order sees it: sinks are +inf, NaN loses to everything, -0 equals 0.
fn effective(score: f32, position: usize, n_sink: usize) -> f32 {
    if position < n_sink {
        f32::INFINITY
    } else if score.is_nan() {
        f32::NEG_INFINITY
    } else {
        score + 0.0
    }
}
