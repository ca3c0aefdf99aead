//! Routings that see all their candidates at once: the encoder's, and those whose scores change from block
//! to block (attention-sum baselines), for which no streaming heap exists.

use rayon::prelude::*;
use sluice_tensor::Tensor;

use super::stream::Candidate;
use super::{Budget, check_lens, cuda, effective, empty};
use crate::routed_attention::{PlacedRouting, Routing, Visibility};

/// Bidirectional routing: one block per sequence, which keeps the `k` best of all unpadded positions
/// of `scores [B, T, G]`. Scores on a GPU are routed there and the result is read back; [`route_bidirectional_in_place`] leaves it there.
#[track_caller]
pub fn route_bidirectional(scores: &Tensor, lens: &[usize], budget: &Budget) -> Routing {
    let [batch, t, g] = scores.dims();
    check_lens("route_bidirectional", batch, t, lens);
    budget.check();
    if let Some(gpu) = scores.gpu() {
        return cuda::route(gpu, scores, lens, budget, Visibility::Bidirectional).download();
    }
    let n_routed = budget.top_k.min(t);
    let mut routing = Routing {
        n_blocks: 1,
        n_routed,
        indices: vec![-1; batch * g * n_routed],
        tau: vec![f32::NEG_INFINITY; batch * g],
        visibility: Visibility::Bidirectional,
        ..empty(batch, t, g, lens, budget)
    };
    for i in 0..batch * g {
        let (b, head) = (i / g, i % g);
        let column: Vec<f32> = scores.f32()[b * t * g..][..lens[b] * g].iter().skip(head).step_by(g).copied().collect();
        routing.tau[i] = keep_best(&column, budget, &mut routing.indices[i * n_routed..(i + 1) * n_routed]);
    }
    routing
}

/// [`route_bidirectional`] that leaves the routing where the scores are, without waiting for a GPU.
#[track_caller]
pub fn route_bidirectional_in_place(scores: &Tensor, lens: &[usize], budget: &Budget) -> PlacedRouting {
    let Some(gpu) = scores.gpu() else { return route_bidirectional(scores, lens, budget).into() };
    let [batch, t, _] = scores.dims();
    check_lens("route_bidirectional_in_place", batch, t, lens);
    budget.check();
    cuda::route(gpu, scores, lens, budget, Visibility::Bidirectional).into()
}

/// Causal routing whose scores may differ from block to block: `score(b, block, kv_head, out)` fills `out` with
/// the scores of the block's candidates, positions `0..out.len()`.
#[track_caller]
pub fn route_blockwise(
    batch: usize,
    t: usize,
    g: usize,
    lens: &[usize],
    budget: &Budget,
    score: impl Fn(usize, usize, usize, &mut [f32]) + Sync,
) -> Routing {
    check_lens("route_blockwise", batch, t, lens);
    let mut routing = empty(batch, t, g, lens, budget);
    let (n_blocks, n_routed) = (routing.n_blocks, routing.n_routed);
    let kept: Vec<(Vec<i32>, f32)> = (0..batch * n_blocks * g)
        .into_par_iter()
        .map(|i| {
            let (b, block, head) = (i / (n_blocks * g), i / g % n_blocks, i % g);
            let mut indices = vec![-1; n_routed];
            if block * budget.route_every >= lens[b] {
                return (indices, f32::NEG_INFINITY);
            }
            let mut scores = vec![f32::NEG_INFINITY; budget.n_candidates(block)];
            score(b, block, head, &mut scores);
            let tau = keep_best(&scores, budget, &mut indices);
            (indices, tau)
        })
        .collect();
    for (i, (indices, tau)) in kept.into_iter().enumerate() {
        routing.indices[i * n_routed..(i + 1) * n_routed].copy_from_slice(&indices);
        routing.tau[i] = tau;
    }
    routing
}

/// Write the `k` best of all `scores` in ascending order to the front of `indices`; returns `tau`.
fn keep_best(scores: &[f32], budget: &Budget, indices: &mut [i32]) -> f32 {
    let k = budget.top_k.min(scores.len());
    if k == 0 {
        return f32::NEG_INFINITY;
    }
    let mut candidates: Vec<Candidate> =
        scores.iter().enumerate().map(|(j, &s)| Candidate { score: effective(s, j, budget.n_sink), position: j as i32 }).collect();
    let (_, worst, _) = candidates.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
    let tau = if k == budget.top_k { worst.score } else { f32::NEG_INFINITY };
    for (slot, candidate) in indices.iter_mut().zip(&candidates[..k]) {
        *slot = candidate.position;
    }
    indices[..k].sort_unstable();
    tau
}
