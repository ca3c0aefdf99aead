//! What the gates of a model do on one document: which tokens each layer keeps, and whether the routing is stable.

use sluice_autograd::Tape;
use sluice_kernels::routed_attention::Routing;
use sluice_kernels::{attention_mass, dense_attention, top_k_routing};
use sluice_model::policy::{Policy, budget};
use sluice_model::{AttentionPlan, Decoder};
use sluice_spec::RoutingConfig;
use sluice_tensor::{Device, Tensor};

use crate::report::{Health, HeatMap, HeatRow, LayerHealth, Quantiles, Sample, SampleToken};

/// Columns of the heat map.
const BINS: usize = 64;

/// Tokens of the sample passage.
const PASSAGE: usize = 400;

/// Routing of every layer on one document, as the student itself runs.
pub struct Inside {
    routing: RoutingConfig,
    n_tokens: usize,
    layers: Vec<LayerInside>,
}

struct LayerInside {
    /// `[1, T, G]`, in main memory.
    scores: Tensor,
    routed: Routing,
    /// Share of dense attention mass on kept and local keys.
    kept_mass: f64,
}

impl Inside {
    /// Run a document through the routed student and look at every layer. Panics for a model without gates.
    #[track_caller]
    pub fn of(model: &Decoder, tokens: &[u32], routing: &RoutingConfig) -> Self {
        let tape = Tape::frozen();
        let lens = [tokens.len()];
        let positions: Vec<u32> = (0..tokens.len() as u32).collect();
        let plan = AttentionPlan::new(Policy::Gate, *routing);
        let mut h = model.embed(&tape, tokens, 1);
        let mut layers = Vec::new();
        for (index, layer) in model.layers.iter().enumerate() {
            let p = layer.project(&tape, &h, &positions);
            let scores = layer.score(&tape, &p.x, &positions).value().to(&Device::Cpu);
            let routed = top_k_routing::route(&scores, &lens, &budget(routing));
            let (_, lse) = dense_attention::fwd(p.q.value(), p.k.value(), p.v.value(), 0, &lens);
            let mass = attention_mass::block_mass(p.q.value(), p.k.value(), &lse, routing.route_every, 1.0, &lens); // [1, blocks, G, S]
            let kept_mass = kept_mass(&mass.to(&Device::Cpu), &routed);
            let (o, _) = plan.attend(&tape, layer, index, &h, &p, &lens);
            let block = layer.block_output(&tape, &o);
            h = layer.finish(&tape, &h, &block);
            layers.push(LayerInside { scores, routed, kept_mass });
        }
        Self { routing: *routing, n_tokens: tokens.len(), layers }
    }

    /// Stability of the routing, layer by layer.
    pub fn health(&self) -> Health {
        let layers = self.layers.iter().enumerate().map(|(layer, inside)| {
            let (t, k) = (self.n_tokens as f64, self.routing.top_k as f64);
            let candidates = t - self.routing.window as f64;
            let (jaccard, admissions) = inside.changes();
            LayerHealth {
                layer,
                jaccard,
                margin: Quantiles::of(&mut inside.margins()),
                admissions,
                expected_admissions: if candidates > k { k * (1.0 + (candidates / k).ln()) } else { candidates.max(0.0) },
                kept_mass: Some(inside.kept_mass),
            }
        });
        Health { context: self.n_tokens, layers: layers.collect(), ..Health::default() }
    }

    /// Share of tokens that each KV head still keeps at the end of the document, by place in the text.
    pub fn heat_map(&self, text: &str) -> HeatMap {
        let bin = self.n_tokens.div_ceil(BINS).max(1);
        let mut rows = Vec::new();
        for (layer, inside) in self.layers.iter().enumerate() {
            for head in 0..inside.routed.n_kv_heads {
                let kept = self.kept_at_the_end(inside, head);
                let share = kept.chunks(bin).map(|c| c.iter().filter(|k| **k).count() as f32 / c.len() as f32).collect();
                rows.push(HeatRow { layer, kv_head: Some(head), share });
            }
        }
        HeatMap { text: text.into(), context: self.n_tokens, kv_budget: self.routing.kv_budget(), bin, rows, ..HeatMap::default() }
    }

    /// In how many layer-heads each token of a passage is still kept at the end; `token_text[i]` is the text of token `i`.
    pub fn sample(&self, text: &str, token_text: impl Fn(usize) -> String) -> Sample {
        let heads = self.layers.first().map_or(0, |l| l.routed.n_kv_heads);
        let kept: Vec<Vec<bool>> =
            self.layers.iter().flat_map(|inside| (0..heads).map(|head| self.kept_at_the_end(inside, head))).collect();
        let tokens =
            (0..self.n_tokens.min(PASSAGE)).map(|i| SampleToken { text: token_text(i), kept_in: kept.iter().filter(|k| k[i]).count() });
        Sample {
            text: text.into(),
            context: self.n_tokens,
            kv_budget: self.routing.kv_budget(),
            n_layer_heads: kept.len(),
            tokens: tokens.collect(),
            ..Sample::default()
        }
    }

    fn kept_at_the_end(&self, inside: &LayerInside, head: usize) -> Vec<bool> {
        let last = inside.routed.n_blocks - 1;
        let mut kept = vec![false; self.n_tokens];
        inside.routed.routed(0, last, head).iter().for_each(|&j| kept[j as usize] = true);
        kept[(last * self.routing.route_every + 1).saturating_sub(self.routing.window)..].fill(true);
        kept
    }
}

impl LayerInside {
    /// Mean Jaccard index of consecutive full blocks, and admissions per KV head.
    fn changes(&self) -> (f64, f64) {
        let r = &self.routed;
        let (mut jaccard, mut pairs, mut admitted) = (0.0, 0, 0);
        for head in 0..r.n_kv_heads {
            for block in 1..r.n_blocks {
                let (before, now) = (r.routed(0, block - 1, head), r.routed(0, block, head));
                let both = now.iter().filter(|j| before.binary_search(j).is_ok()).count();
                admitted += now.len() - both;
                if before.len() == r.n_routed && r.n_routed > 0 {
                    jaccard += both as f64 / (before.len() + now.len() - both) as f64;
                    pairs += 1;
                }
            }
        }
        (if pairs == 0 { 1.0 } else { jaccard / pairs as f64 }, admitted as f64 / r.n_kv_heads as f64)
    }

    /// `|score - tau|` of every candidate of the last block.
    fn margins(&self) -> Vec<f64> {
        let r = &self.routed;
        let last = r.n_blocks - 1;
        let n_candidates = (last * r.route_every + 1).saturating_sub(r.window);
        let mut margins = Vec::new();
        for head in 0..r.n_kv_heads {
            let tau = r.tau_of(0, last, head);
            if tau.is_finite() {
                margins.extend((0..n_candidates).map(|j| (self.scores.f32()[j * r.n_kv_heads + head] - tau).abs() as f64));
            }
        }
        margins
    }
}

/// Share of dense attention that falls on routed and local keys, mean over blocks and heads.
fn kept_mass(mass: &Tensor, routing: &Routing) -> f64 {
    let [_, n_blocks, g, s] = mass.dims();
    let (mut kept, mut all) = (0.0, 0.0);
    for block in 0..n_blocks {
        for head in 0..g {
            let row = &mass.f32()[(block * g + head) * s..][..s];
            let first_local = (block * routing.route_every + 1).saturating_sub(routing.window);
            all += row.iter().map(|&m| m as f64).sum::<f64>();
            kept += row[first_local..].iter().map(|&m| m as f64).sum::<f64>();
            kept += routing.routed(0, block, head).iter().map(|&j| row[j as usize] as f64).sum::<f64>();
        }
    }
    if all == 0.0 { 1.0 } else { kept / all }
}
