//! Who decides which keys are kept. Every policy ends in the same `Routing` value, so the kernel,
//! the cost model and the report treat them alike.
//!
//! `gate`, `streaming` and `random` have static scores and run token by token in constant memory.
//! `h2o` and `oracle` look at attention that a bounded cache does not have; they are baselines for whole sequences.

use serde::{Deserialize, Serialize};
use sluice_autograd::{Tape, Var};
use sluice_kernels::gumbel::{self, mix, uniform};
use sluice_kernels::routed_attention::PlacedRouting;
use sluice_kernels::top_k_routing::{self, Budget};
use sluice_kernels::{attention_label, attention_mass, dense_attention};
use sluice_spec::RoutingConfig;
use sluice_tensor::{Device, Tensor};

use crate::layer::{Layer, Projected};

/// Positions after the window over which an oracle looks, and over which labels are computed.
pub const HORIZON: usize = 1024;

/// Source of the decision which keys to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Every key: plain causal attention.
    Dense,
    /// The learned gate.
    Gate,
    /// StreamingLLM: sinks and the most recent keys.
    Streaming,
    /// Sinks and a uniformly random set, fixed per layer, KV head and position.
    Random,
    /// Heavy hitters: largest attention accumulated so far, measured with the full cache, which flatters it.
    H2o,
    /// Largest future attention: an upper reference, not a method.
    Oracle,
}

impl Policy {
    /// Every policy, in the order of reports.
    pub const ALL: [Self; 6] = [Self::Dense, Self::Gate, Self::Streaming, Self::Random, Self::H2o, Self::Oracle];

    /// Name in commands and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Gate => "gate",
            Self::Streaming => "streaming",
            Self::Random => "random",
            Self::H2o => "h2o",
            Self::Oracle => "oracle",
        }
    }

    /// Parse a name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.name() == name)
    }

    /// Whether the policy can run token by token in a bounded cache.
    pub fn is_causal_and_static(self) -> bool {
        !matches!(self, Self::H2o | Self::Oracle)
    }
}

/// Gumbel noise on the gate scores, which lets training look beyond the present choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateNoise {
    /// Seed; change it every step.
    pub seed: u64,
    /// Scale of the noise in score units.
    pub scale: f32,
}

/// How the attention of every layer of one forward pass decides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionPlan {
    /// Who decides.
    pub policy: Policy,
    /// Budget and rhythm; ignored by `dense`.
    pub routing: RoutingConfig,
    /// Noise on the gate's scores while training.
    pub noise: Option<GateNoise>,
    /// Keys beyond `top_k` that fade out instead of being dropped while training, if there is a gate temperature.
    pub overhang: usize,
}

/// The part of a routing config that the router needs.
pub fn budget(routing: &RoutingConfig) -> Budget {
    Budget { window: routing.window, top_k: routing.top_k, route_every: routing.route_every, n_sink: routing.n_sink }
}

impl AttentionPlan {
    /// Plain causal attention.
    pub fn dense() -> Self {
        Self { policy: Policy::Dense, routing: RoutingConfig::default(), noise: None, overhang: 0 }
    }

    /// A policy at a budget, without noise.
    pub fn new(policy: Policy, routing: RoutingConfig) -> Self {
        Self { policy, routing, noise: None, overhang: 0 }
    }

    /// Attention `[B, T, H, D]` of whole sequences, and the gate's scores if it decided.
    pub fn attend(&self, tape: &Tape, layer: &Layer, index: usize, h: &Var, p: &Projected, lens: &[usize]) -> (Var, Option<Var>) {
        if self.policy == Policy::Dense {
            return (tape.dense_attention(&p.q, &p.k, &p.v, 0, lens), None);
        }
        if self.policy == Policy::Gate {
            let [_, t, _, _] = p.q.value().dims();
            let positions: Vec<u32> = (0..t as u32).collect();
            let scores = self.perturb(tape, layer.score(tape, &p.x, &positions), index); // [B, T, G]
            let temperature = self.routing.gate_temperature;
            // Without a bias nothing fades, and what is beyond the budget stays out.
            let overhang = if temperature > 0.0 { self.overhang } else { 0 };
            let routing = top_k_routing::route_with_overhang(scores.value(), lens, &budget(&self.routing), overhang);
            let bias = (temperature > 0.0).then(|| {
                let scores = if overhang > 0 { tape.shift_free(&scores, lens) } else { scores.clone() };
                tape.mark_sinks(&scores, &positions, self.routing.n_sink)
            });
            let o = layer.attend_routed(tape, p, bias.as_ref(), temperature, &routing);
            return (o, Some(scores));
        }
        let routing = self.baseline_routing(layer, index, h.value(), p, lens);
        (layer.attend_routed(tape, p, None, 0.0, &routing), None)
    }

    /// Routing of a policy that has no gate.
    fn baseline_routing(&self, layer: &Layer, index: usize, h: &Tensor, p: &Projected, lens: &[usize]) -> PlacedRouting {
        let [b, t, g, _] = p.k.value().dims();
        let budget = budget(&self.routing);
        match self.policy {
            Policy::Streaming | Policy::Random => {
                let scores = (0..b).flat_map(|_| (0..t * g).map(|i| self.static_score(index, i / g, i % g))).collect();
                let scores = Tensor::from_vec(scores, [b, t, g]).to(&h.device());
                top_k_routing::route_in_place(&scores, lens, &budget)
            }
            Policy::H2o => {
                let (_, lse) = dense_attention::fwd(p.q.value(), p.k.value(), p.v.value(), 0, lens);
                let mut seen = attention_mass::block_mass(p.q.value(), p.k.value(), &lse, budget.route_every, 1.0, lens).to(&Device::Cpu); // [B, n_blocks, G, S]
                let n_blocks = t.div_ceil(budget.route_every);
                accumulate_blocks(seen.f32_mut(), b, n_blocks, g * t);
                let seen = seen.f32();
                top_k_routing::route_blockwise(b, t, g, lens, &budget, |bi, block, gi, scores| {
                    // Block 0 has no candidates, so `block - 1` exists whenever there is something to score.
                    let at = ((bi * n_blocks + block.saturating_sub(1)) * g + gi) * t;
                    scores.copy_from_slice(&seen[at..at + scores.len()]);
                })
                .into()
            }
            Policy::Oracle => {
                let scores = future_attention_labels(layer, h, p, lens, budget.window);
                top_k_routing::route_in_place(&scores, lens, &budget)
            }
            Policy::Dense | Policy::Gate => unreachable!("decided by the caller"),
        }
    }

    /// Score of a token under a policy that looks at nothing but its position.
    pub fn static_score(&self, layer: usize, position: usize, kv_head: usize) -> f32 {
        match self.policy {
            Policy::Random => uniform(mix(position as u64, ((layer as u64) << 32) | kv_head as u64)),
            _ => 0.0,
        }
    }

    fn perturb(&self, tape: &Tape, scores: Var, layer: usize) -> Var {
        let Some(noise) = self.noise else { return scores };
        let noisy = gumbel::add_noise(scores.value(), noise.seed, layer as u64, noise.scale);
        tape.custom(&[&scores], noisy, |dy| vec![Some(dy.clone())])
    }
}

/// `y [B, T, G]`: how much the queries that come after a key has left the window would miss it.
///
/// `y_j = 1/2 log sum_t sum_h (a_tj |W_O v_j| / |h_t|)^2` over `t in [j + window, j + window + HORIZON)`, cut at the
/// end of the sequence, so late keys see a shorter future; labels for fitting leave those out. `a_tj |W_O v_j|` is what
/// a key writes to the residual stream (KVzip+, arXiv 2601.07891), so the sum of squares is, up to cross terms, the
/// squared error that evicting the key causes. A sum without squares instead rewards keys that many queries read a little.
pub fn future_attention_labels(layer: &Layer, h: &Tensor, p: &Projected, lens: &[usize], window: usize) -> Tensor {
    let (_, lse) = dense_attention::fwd(p.q.value(), p.k.value(), p.v.value(), 0, lens);
    let everything: Vec<Vec<u32>> = lens.iter().map(|&n| (0..n as u32).collect()).collect();
    let labels = future_attention_at(layer, h, p, &lse, &everything, lens, window);
    let [b, t, g, _] = p.k.value().dims();
    if let [whole] = labels.as_slice()
        && lens == [t]
    {
        return whole.reshape([1, t, g]);
    }
    let mut all = vec![f32::NEG_INFINITY; b * t * g];
    for (bi, of_sequence) in labels.iter().enumerate() {
        all[bi * t * g..][..of_sequence.len()].copy_from_slice(of_sequence.to(&Device::Cpu).f32());
    }
    Tensor::from_vec(all, [b, t, g]).to(&h.device())
}

/// The labels of [`future_attention_labels`] for chosen positions of each sequence, `[n_b, G]` each, given the
/// `lse [B, T, H]` of dense attention.
pub fn future_attention_at(
    layer: &Layer,
    h: &Tensor,
    p: &Projected,
    lse: &Tensor,
    positions: &[Vec<u32>],
    lens: &[usize],
    window: usize,
) -> Vec<Tensor> {
    if positions.iter().all(Vec::is_empty) {
        let [_, _, g, _] = p.k.value().dims();
        return vec![Tensor::zeros([0, g]); positions.len()];
    }
    let key_weight = attention_label::key_weight(&layer.attention.o_proj.weight.value, p.v.value()); // [B, S, H]
    let query_weight = attention_label::query_weight(h); // [B, T]
    let mass = attention_mass::future_mass(
        p.q.value(),
        p.k.value(),
        lse,
        Some(&key_weight),
        Some(&query_weight),
        positions,
        window,
        HORIZON,
        2.0,
        lens,
    );
    mass.iter().map(attention_label::label).collect()
}

fn accumulate_blocks(mass: &mut [f32], batch: usize, n_blocks: usize, per_block: usize) {
    for sequence in mass.chunks_exact_mut(n_blocks * per_block).take(batch) {
        for block in 1..n_blocks {
            let (before, this) = sequence[(block - 1) * per_block..].split_at_mut(per_block);
            this[..per_block].iter_mut().zip(before).for_each(|(a, b)| *a += *b);
        }
    }
}
