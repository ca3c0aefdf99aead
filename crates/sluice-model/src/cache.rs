//! Key-value caches for text that arrives in chunks or token by token: bounded when routed, growing when dense.
//!
//! A routed layer keeps, per KV head, a strip of at most `window + route_every - 1` recent keys that have not been decided
//! yet, and `top_k` slots of admitted keys. Chunks are cut at block boundaries, so admission happens before the
//! block's first key arrives and the bound `top_k + window + route_every - 1` holds at every moment.

use sluice_autograd::Tape;
use sluice_kernels::dense_attention;
use sluice_kernels::routed_attention::{self, GateBias, Routing, Visibility};
use sluice_kernels::top_k_routing::RouterState;
use sluice_spec::ModelConfig;
use sluice_tensor::Tensor;

use crate::layer::{Layer, Projected};
use crate::policy::{AttentionPlan, Policy, budget};

/// Caches of one sequence, one per layer. A clone continues on its own; storage is copied when one of them changes.
#[derive(Clone)]
pub struct Cache {
    plan: AttentionPlan,
    position: usize,
    layers: Vec<LayerCache>,
    /// Per layer `[T, G]` of the last chunk; empty for a dense cache.
    last_scores: Vec<Vec<f32>>,
}

#[derive(Clone)]
enum LayerCache {
    Growing { k: Vec<f32>, v: Vec<f32> },
    Bounded(BoundedCache),
}

impl Cache {
    /// An empty cache. Panics for a policy that needs attention of the whole sequence (`h2o`, `oracle`).
    #[track_caller]
    pub fn new(config: &ModelConfig, plan: AttentionPlan) -> Self {
        assert!(plan.policy.is_causal_and_static(), "policy {} cannot decode token by token", plan.policy.name());
        let layers = (0..config.n_layers)
            .map(|_| match plan.policy {
                Policy::Dense => LayerCache::Growing { k: Vec::new(), v: Vec::new() },
                _ => LayerCache::Bounded(BoundedCache::new(config, &plan)),
            })
            .collect();
        Self { plan, position: 0, layers, last_scores: vec![Vec::new(); config.n_layers] }
    }

    /// Tokens seen so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes of keys and values held for all layers.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
    }

    /// Scores `[T, G]` that routed the last chunk of a layer; none for a dense cache.
    pub fn last_scores(&self, layer: usize) -> &[f32] {
        &self.last_scores[layer]
    }

    /// Positions that a layer's KV head holds now, ascending; `None` for a dense cache, which holds all.
    pub fn kept_positions(&self, layer: usize, kv_head: usize) -> Option<Vec<u32>> {
        match &self.layers[layer] {
            LayerCache::Growing { .. } => None,
            LayerCache::Bounded(cache) => Some(cache.kept_positions(kv_head, self.position)),
        }
    }

    pub(crate) fn advance(&mut self, n: usize) {
        self.position += n;
    }

    /// Append the keys and values of a chunk and attend from its queries: `[1, T, H, D]`.
    pub(crate) fn attend(&mut self, tape: &Tape, layer: &Layer, index: usize, p: &Projected, positions: &[u32]) -> Tensor {
        let [_, t, h, d] = p.q.value().dims();
        match &mut self.layers[index] {
            LayerCache::Growing { k, v } => {
                let g = layer.shape.n_kv_heads;
                k.extend_from_slice(p.k.value().f32());
                v.extend_from_slice(p.v.value().f32());
                let n = self.position + t;
                let keys = Tensor::from_vec(std::mem::take(k), [1, n, g, d]);
                let values = Tensor::from_vec(std::mem::take(v), [1, n, g, d]);
                let (o, _) = dense_attention::fwd(p.q.value(), &keys, &values, self.position, &[t]);
                (*k, *v) = (keys.into_vec(), values.into_vec());
                o
            }
            LayerCache::Bounded(cache) => {
                let g = layer.shape.n_kv_heads;
                let mut scores = match self.plan.policy {
                    Policy::Gate => layer.score(tape, &p.x, positions).value().f32().to_vec(),
                    _ => positions
                        .iter()
                        .flat_map(|&t| (0..g).map(move |gi| (t, gi)))
                        .map(|(t, gi)| self.plan.static_score(index, t as usize, gi))
                        .collect(),
                };
                let sinks = self.plan.routing.n_sink.saturating_sub(self.position).min(t);
                scores[..sinks * g].fill(f32::INFINITY);
                let r = self.plan.routing.route_every;
                let mut o = Vec::with_capacity(t * h * d);
                let mut done = 0;
                while done < t {
                    let start = self.position + done;
                    let n = (r - start % r).min(t - done);
                    let chunk = Chunk {
                        start,
                        n,
                        q: &p.q.value().f32()[done * h * d..(done + n) * h * d],
                        k: &p.k.value().f32()[done * g * d..(done + n) * g * d],
                        v: &p.v.value().f32()[done * g * d..(done + n) * g * d],
                        scores: &scores[done * g..(done + n) * g],
                    };
                    o.extend_from_slice(cache.attend(&self.plan, chunk, h).f32());
                    done += n;
                }
                self.last_scores[index] = scores;
                Tensor::from_vec(o, [1, t, h, d])
            }
        }
    }
}

impl LayerCache {
    fn bytes(&self) -> usize {
        match self {
            Self::Growing { k, v } => 4 * (k.len() + v.len()),
            Self::Bounded(cache) => cache.k.bytes() + cache.v.bytes(),
        }
    }
}

/// Part of a chunk that lies within one block: its inputs, row-major.
struct Chunk<'a> {
    start: usize,
    n: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    scores: &'a [f32],
}

/// Cache of a routed layer: first the strip of recent keys, then the slots.
#[derive(Clone)]
struct BoundedCache {
    /// `[1, window + route_every - 1 + top_k, G, D]`.
    k: Tensor,
    v: Tensor,
    /// `[1, rows, G]`, needed when the gate's bias stays on.
    scores: Tensor,
    /// `[G, top_k]` position held by each slot, -1 when free.
    slots: Vec<i32>,
    /// Rows of the strip, `window + route_every - 1`; the slots follow.
    strip_rows: usize,
    /// Position of the key in row 0.
    strip_start: usize,
    /// Rows of the strip in use.
    strip_len: usize,
    router: RouterState,
}

impl BoundedCache {
    fn new(config: &ModelConfig, plan: &AttentionPlan) -> Self {
        let (rows, g, d) = (plan.routing.cached_keys(), config.n_kv_heads, config.head_dim);
        Self {
            k: Tensor::zeros([1, rows, g, d]),
            v: Tensor::zeros([1, rows, g, d]),
            scores: Tensor::zeros([1, rows, g]),
            slots: vec![-1; g * plan.routing.top_k],
            strip_rows: plan.routing.window + plan.routing.route_every - 1,
            strip_start: 0,
            strip_len: 0,
            router: RouterState::new(g, budget(&plan.routing)),
        }
    }

    fn attend(&mut self, plan: &AttentionPlan, chunk: Chunk<'_>, n_heads: usize) -> Tensor {
        let [_, _, g, d] = self.k.dims();
        let RoutingShape { top_k, window, route_every } = RoutingShape::of(plan);
        let decided = self.router.route_chunk(chunk.scores);
        assert_eq!(decided.n_blocks, 1, "a chunk was not cut at its block boundary");
        self.admit(&decided.positions, top_k);
        self.drop_decided((chunk.start / route_every * route_every + 1).saturating_sub(window));
        self.append(&chunk);

        let mut indices = vec![-1; g * top_k];
        for gi in 0..g {
            let slots = &self.slots[gi * top_k..(gi + 1) * top_k];
            let mut kept: Vec<(i32, i32)> = slots.iter().enumerate().filter(|(_, p)| **p >= 0).map(|(row, &p)| (p, row as i32)).collect();
            kept.sort_unstable(); // by position, the order in which prefill sums
            for (place, (_, row)) in indices[gi * top_k..].iter_mut().zip(kept) {
                *place = self.strip_rows as i32 + row;
            }
        }
        let routing = Routing {
            batch: 1,
            n_blocks: 1,
            n_kv_heads: g,
            n_routed: top_k,
            indices,
            tau: decided.tau,
            window,
            route_every,
            start: chunk.start,
            key_offset: self.strip_start,
            lens: vec![chunk.n],
            visibility: Visibility::Causal,
        };
        let q = Tensor::from_vec(chunk.q.to_vec(), [1, chunk.n, n_heads, d]);
        let bias = (plan.policy == Policy::Gate && plan.routing.gate_temperature > 0.0)
            .then_some(GateBias { scores: &self.scores, temperature: plan.routing.gate_temperature });
        routed_attention::fwd(&q, &self.k, &self.v, bias, &routing).0
    }

    /// Free the slots of evicted keys and copy newly kept keys from the strip into them.
    fn admit(&mut self, positions: &[i32], top_k: usize) {
        let [_, _, g, d] = self.k.dims();
        for gi in 0..g {
            let kept = &positions[gi * top_k..(gi + 1) * top_k];
            let slots = &mut self.slots[gi * top_k..(gi + 1) * top_k];
            // Both lists are small; `kept` is ascending with its padding at the end.
            let n_kept = kept.iter().position(|&p| p < 0).unwrap_or(top_k);
            let kept = &kept[..n_kept];
            slots.iter_mut().filter(|p| **p >= 0 && kept.binary_search(p).is_err()).for_each(|p| *p = -1);
            let mut held: Vec<i32> = slots.iter().copied().filter(|&p| p >= 0).collect();
            held.sort_unstable();
            let mut free = 0;
            for &position in kept.iter().filter(|p| held.binary_search(p).is_err()) {
                while slots[free] >= 0 {
                    free += 1;
                }
                slots[free] = position;
                let (from, to) = (position as usize - self.strip_start, self.strip_rows + free);
                let (source, target) = ((from * g + gi) * d, (to * g + gi) * d);
                self.k.f32_mut().copy_within(source..source + d, target);
                self.v.f32_mut().copy_within(source..source + d, target);
                let score = self.scores.f32()[from * g + gi];
                self.scores.f32_mut()[to * g + gi] = score;
            }
        }
    }

    /// Forget the strip before `first_local`: its keys are now either in slots or evicted.
    fn drop_decided(&mut self, first_local: usize) {
        let [_, _, g, d] = self.k.dims();
        let n = first_local.saturating_sub(self.strip_start).min(self.strip_len);
        if n == 0 {
            return;
        }
        self.k.f32_mut().copy_within(n * g * d..self.strip_len * g * d, 0);
        self.v.f32_mut().copy_within(n * g * d..self.strip_len * g * d, 0);
        self.scores.f32_mut().copy_within(n * g..self.strip_len * g, 0);
        self.strip_start += n;
        self.strip_len -= n;
    }

    fn append(&mut self, chunk: &Chunk<'_>) {
        let [_, _, g, d] = self.k.dims();
        let row = self.strip_len;
        assert!(row + chunk.n <= self.strip_rows, "{} keys do not fit behind {row} in a strip of {}", chunk.n, self.strip_rows);
        self.k.f32_mut()[row * g * d..][..chunk.k.len()].copy_from_slice(chunk.k);
        self.v.f32_mut()[row * g * d..][..chunk.v.len()].copy_from_slice(chunk.v);
        self.scores.f32_mut()[row * g..][..chunk.scores.len()].copy_from_slice(chunk.scores);
        self.strip_len += chunk.n;
    }

    fn kept_positions(&self, kv_head: usize, position: usize) -> Vec<u32> {
        let top_k = self.slots.len() / self.k.shape()[2];
        let slots = &self.slots[kv_head * top_k..(kv_head + 1) * top_k];
        let mut kept: Vec<u32> = slots.iter().filter(|p| **p >= 0).map(|&p| p as u32).collect();
        kept.extend(self.strip_start as u32..position as u32);
        kept.sort_unstable();
        kept
    }
}

struct RoutingShape {
    top_k: usize,
    window: usize,
    route_every: usize,
}

impl RoutingShape {
    fn of(plan: &AttentionPlan) -> Self {
        let routing = &plan.routing;
        Self { top_k: routing.top_k, window: routing.window, route_every: routing.route_every }
    }
}
