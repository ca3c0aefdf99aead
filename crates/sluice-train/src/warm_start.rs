//! Stage 0: a gate fitted in closed form, without backpropagation.
//!
//! Per layer and KV head, ridge regression on the normalised attention input, the linear form of KVzap
//! (arXiv 2601.07891). What is regressed is not the future attention `y` of a key (see
//! [`sluice_model::policy::future_attention_at`]) but `-log` of its rank among the keys of its document: a router only
//! compares scores, and a fit of `y` itself spends itself on telling apart the many keys that no budget would keep.
//! Every halving of the budget weighs the same. The label is blind to age: an old key that has had its readers scores like a young one that
//! still has them ahead. A recency slope per KV head repairs that; it is chosen by a line search on the attention
//! mass that the resulting routing keeps, which is what the gate is for.

use anyhow::{Result, bail};
use rayon::prelude::*;
use sluice_autograd::{Param, Tape};
use sluice_kernels::ridge::{RidgeSums, Sums};
use sluice_kernels::{attention_mass, dense_attention, gate_score, kept_mass, log_rank, top_k_routing};
use sluice_model::policy::{self, HORIZON};
use sluice_model::{Decoder, Layer};
use sluice_spec::RoutingConfig;
use sluice_tensor::{Device, Tensor};

use crate::hash::mix;
use crate::snapshot::State;

/// Slopes tried by the line search, in standard deviations of the label per 1024 positions. The last is recency with
/// content as little more than a tie-break: what a head wants that reads nothing far away on purpose.
const SLOPES: [f32; 12] = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.5, 7.0, 12.0, 25.0, 100.0];

/// Sums of the regression over all documents seen.
pub struct WarmStart {
    layers: Vec<RidgeSums>,
    /// Documents added so far.
    pub documents: u64,
}

/// Sampling of the regression.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Positions sampled per document.
    pub samples: usize,
    /// Readers of a key count from so many positions after it: the window at least, where it needs no routing.
    pub readers_from: usize,
    /// Sinks are kept anyway and would bend the fit.
    pub n_sink: usize,
    /// Seed of the positions.
    pub seed: u64,
}

impl Sampling {
    /// Positions of a document of `len` tokens whose whole horizon lies inside it; one random position in each of
    /// `samples` equal strata, ascending.
    pub fn positions(&self, len: usize, document: u64) -> Vec<u32> {
        let end = len.saturating_sub(self.readers_from + HORIZON);
        let range = end.saturating_sub(self.n_sink);
        let n = self.samples.min(range);
        (0..n)
            .map(|i| {
                let (from, to) = (self.n_sink + i * range / n, self.n_sink + (i + 1) * range / n);
                (from as u64 + mix(self.seed ^ document, i as u64) % (to - from) as u64) as u32
            })
            .collect()
    }
}

impl WarmStart {
    /// Empty sums for a model.
    pub fn new(model: &Decoder) -> Self {
        let layer = |_| RidgeSums::new(model.config.d_model, model.config.n_kv_heads);
        Self { layers: model.layers.iter().map(layer).collect(), documents: 0 }
    }

    /// Run one document through the dense model and add its sampled positions. Returns how many there were.
    pub fn add_document(&mut self, model: &Decoder, tokens: &[u32], sampling: &Sampling) -> usize {
        let positions = sampling.positions(tokens.len(), self.documents);
        self.documents += 1;
        if positions.is_empty() {
            return 0;
        }
        let wanted = [positions];
        for_each_dense_layer(model, tokens, |index, layer, dense| {
            let y = policy::future_attention_at(layer, dense.h, dense.p, dense.lse, &wanted, &[tokens.len()], sampling.readers_from);
            self.layers[index].add(dense.p.x.value(), layer.shape.norm_eps, &wanted[0], &log_rank::minus_log_rank(&y[0]));
        });
        wanted[0].len()
    }

    /// Solve the regressions and install the gates, slopes at zero. Returns the label's standard deviation `[L][G]`.
    pub fn install(&self, model: &mut Decoder, lambda: f64) -> Result<Vec<Vec<f32>>> {
        let sums: Vec<Sums> = self.layers.iter().map(RidgeSums::sums).collect();
        if sums[0].samples() == 0.0 {
            bail!(
                "no document was long enough to fit a gate: each needs more than the window plus {HORIZON} tokens; \
                 give longer texts or a longer context"
            );
        }
        let solved: Vec<_> = sums.par_iter().map(|sums| solve(sums, lambda)).collect();
        let mut deviations = Vec::new();
        for (layer, (weight, bias, deviation)) in model.layers.iter_mut().zip(solved) {
            let gate = std::sync::Arc::make_mut(layer).gate.as_mut().expect("gates were added before fitting");
            let shared = gate.bias.value.len() == 1;
            set(&mut gate.weight, mean_rows(weight, bias.len(), shared));
            set(&mut gate.bias, mean_rows(bias, deviation.len(), shared));
            deviations.push(mean_rows(deviation, model.config.n_kv_heads, shared));
        }
        Ok(deviations)
    }

    /// The sums, for a checkpoint.
    pub fn save_into(&self, state: &mut State) {
        for (i, layer) in self.layers.iter().enumerate() {
            let Sums { xx, xy, yy } = layer.sums();
            for (name, sums) in [("xx", xx), ("xy", xy), ("yy", yy)] {
                state.sums.insert(format!("stage0.{i}.{name}"), sums);
            }
        }
    }

    /// Take the sums of a checkpoint; fails when they belong to another model.
    pub fn restore(&mut self, state: &mut State, documents: u64) -> Result<()> {
        self.documents = documents;
        for (i, layer) in self.layers.iter_mut().enumerate() {
            let mut take = |name: &str| state.sums.remove(&format!("stage0.{i}.{name}")).unwrap_or_default();
            let sums = Sums { xx: take("xx"), xy: take("xy"), yy: take("yy") };
            if !layer.set(sums) {
                bail!("the saved run lacks the sums of layer {i} or belongs to another model; start anew without --resume");
            }
        }
        Ok(())
    }
}

/// Choose the recency slope of every gate head: the one whose routing keeps most of the attention that dense
/// queries pay to keys outside their window, averaged over the budgets. Half of the vote counts attention, half squared
/// attention: the first alone would give a head to recency that spreads its attention nearly always and copies from far
/// away when it matters; the second alone forgets that many small losses add up.
pub struct SlopeSearch {
    /// Kept share summed over documents and budgets, `[L][G][SLOPES]`.
    kept: Vec<Vec<[f64; SLOPES.len()]>>,
}

impl SlopeSearch {
    /// An empty search.
    pub fn new(model: &Decoder) -> Self {
        Self { kept: vec![vec![[0.0; SLOPES.len()]; model.config.n_kv_heads]; model.layers.len()] }
    }

    /// Add one document. `deviations [L][G]` are the label's, from [`WarmStart::install`].
    pub fn add_document(&mut self, model: &Decoder, tokens: &[u32], routing: &RoutingConfig, budgets: &[usize], deviations: &[Vec<f32>]) {
        let n_heads = model.config.n_kv_heads;
        for_each_dense_layer(model, tokens, |index, layer, dense| {
            let positions: Vec<u32> = (0..tokens.len() as u32).collect();
            let content = layer.score(&Tape::frozen(), &dense.p.x, &positions); // [1, T, G], slope still zero
            let (q, k) = (dense.p.q.value(), dense.p.k.value());
            let masses = [1.0, 2.0].map(|power| attention_mass::block_mass(q, k, dense.lse, routing.route_every, power, &[tokens.len()]));
            let mut shares = vec![];
            for (si, slope) in SLOPES.into_iter().enumerate() {
                let deviation = |head: usize| deviations[index][head.min(deviations[index].len() - 1)];
                let slopes: Vec<f32> = (0..n_heads).map(|head| slope * deviation(head)).collect();
                let scores = gate_score::add_recency(content.value(), &slopes);
                for &kv_budget in budgets {
                    let Ok(at_budget) = routing.with_kv_budget(kv_budget) else { continue };
                    let routing = top_k_routing::route_in_place(&scores, &[tokens.len()], &policy::budget(&at_budget));
                    shares.extend(masses.iter().map(|mass| (si, kept_mass::kept_share(mass, &routing))));
                }
            }
            // Read when everything is queued: from a GPU, reading waits.
            for (si, share) in shares {
                for (head, share) in share.to(&Device::Cpu).f32().iter().enumerate() {
                    self.kept[index][head][si] += *share as f64;
                }
            }
        });
    }

    /// Install the best slope of every gate head.
    pub fn install(&self, model: &mut Decoder, deviations: &[Vec<f32>]) {
        for ((layer, kept), deviations) in model.layers.iter_mut().zip(&self.kept).zip(deviations) {
            let gate = std::sync::Arc::make_mut(layer).gate.as_mut().expect("gates were added before fitting");
            let n_gates = gate.recency.value.len();
            let slopes = (0..n_gates)
                .map(|gi| {
                    let heads = if n_gates == 1 { 0..kept.len() } else { gi..gi + 1 };
                    let total = |si: usize| kept[heads.clone()].iter().map(|k| k[si]).sum::<f64>();
                    let best = (0..SLOPES.len()).max_by(|&a, &b| total(a).total_cmp(&total(b))).expect("slopes");
                    SLOPES[best] * deviations[gi]
                })
                .collect();
            set(&mut gate.recency, slopes);
        }
    }
}

/// What a dense pass shows of one layer.
struct DenseLayer<'a> {
    /// Residual stream before the layer, `[1, T, M]`.
    h: &'a Tensor,
    p: &'a sluice_model::layer::Projected,
    /// `[1, T, H]`.
    lse: &'a Tensor,
}

/// Run a document through the dense model, showing every layer's projections on the way.
fn for_each_dense_layer(model: &Decoder, tokens: &[u32], mut look: impl FnMut(usize, &Layer, DenseLayer<'_>)) {
    let tape = Tape::frozen();
    let positions: Vec<u32> = (0..tokens.len() as u32).collect();
    let mut h = model.embed(&tape, tokens, 1);
    for (index, layer) in model.layers.iter().enumerate() {
        let p = layer.project(&tape, &h, &positions);
        let (o, lse) = dense_attention::fwd(p.q.value(), p.k.value(), p.v.value(), 0, &[tokens.len()]);
        look(index, layer, DenseLayer { h: h.value(), p: &p, lse: &lse });
        if index + 1 < model.layers.len() {
            h = layer.finish(&tape, &h, &layer.block_output(&tape, &tape.constant(o)));
        }
    }
}

/// Weights `[G, M]`, intercepts `[G]` and standard deviations of the label `[G]`.
fn solve(sums: &Sums, lambda: f64) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let g = sums.yy.len();
    let m1 = sums.xy.len() / g;
    let mut a = sums.xx.clone();
    (0..m1 - 1).for_each(|i| a[i * m1 + i] += lambda); // the intercept is not shrunk
    let factor = cholesky(a, m1);
    let n = sums.samples();
    let (mut weight, mut bias, mut deviation) = (vec![0.0; g * (m1 - 1)], vec![0.0; g], vec![0.0; g]);
    for head in 0..g {
        let rhs: Vec<f64> = (0..m1).map(|i| sums.xy[i * g + head]).collect();
        let solution = solve_cholesky(&factor, m1, rhs);
        weight[head * (m1 - 1)..(head + 1) * (m1 - 1)].iter_mut().zip(&solution).for_each(|(w, s)| *w = *s as f32);
        bias[head] = solution[m1 - 1] as f32;
        let mean = sums.xy[(m1 - 1) * g + head] / n;
        deviation[head] = (sums.yy[head] / n - mean * mean).max(0.0).sqrt() as f32;
    }
    (weight, bias, deviation)
}

/// Lower factor of a symmetric positive definite `[n, n]`, in place.
fn cholesky(mut a: Vec<f64>, n: usize) -> Vec<f64> {
    for j in 0..n {
        let (above, rest) = a.split_at_mut(j * n);
        let row_j = &mut rest[..n];
        for k in 0..j {
            let row_k = &above[k * n..k * n + k + 1];
            let dot: f64 = row_j[..k].iter().zip(&row_k[..k]).map(|(x, y)| x * y).sum();
            row_j[k] = (row_j[k] - dot) / row_k[k];
        }
        let square: f64 = row_j[..j].iter().map(|x| x * x).sum();
        row_j[j] = (row_j[j] - square).max(f64::MIN_POSITIVE).sqrt();
    }
    a
}

fn solve_cholesky(l: &[f64], n: usize, mut b: Vec<f64>) -> Vec<f64> {
    for i in 0..n {
        let dot: f64 = (0..i).map(|k| l[i * n + k] * b[k]).sum();
        b[i] = (b[i] - dot) / l[i * n + i];
    }
    for i in (0..n).rev() {
        let dot: f64 = (i + 1..n).map(|k| l[k * n + i] * b[k]).sum();
        b[i] = (b[i] - dot) / l[i * n + i];
    }
    b
}

fn set(param: &mut Param, values: Vec<f32>) {
    param.value = Tensor::from_vec(values, param.value.shape()).to(&param.value.device());
}

/// Average `n` rows into one when a gate is shared by the KV heads; a mean of linear fits is the fit of the mean.
fn mean_rows(rows: Vec<f32>, n: usize, shared: bool) -> Vec<f32> {
    if !shared || n == 1 {
        return rows;
    }
    let width = rows.len() / n;
    (0..width).map(|i| (0..n).map(|r| rows[r * width + i]).sum::<f32>() / n as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_testkit::Rng;

    #[test]
    fn ridge_recovers_a_linear_rule() {
        let (m, g, n) = (12, 2, 4000);
        let mut rng = Rng::new(5);
        let x = rng.normal_tensor([1, n, m]);
        let truth = rng.normal_tensor([g, m]);
        let inv_rms: Vec<f32> = x.f32().chunks_exact(m).map(|r| (r.iter().map(|v| v * v).sum::<f32>() / m as f32).sqrt().recip()).collect();
        let y: Vec<f32> = (0..n * g)
            .map(|i| {
                let dot: f32 = x.f32()[i / g * m..][..m].iter().zip(&truth.f32()[i % g * m..][..m]).map(|(a, b)| a * b).sum();
                dot * inv_rms[i / g] + 3.0
            })
            .collect();
        let mut sums = RidgeSums::new(m, g);
        let positions: Vec<u32> = (0..n as u32).collect();
        sums.add(&x, 0.0, &positions, &Tensor::from_vec(y, [n, g]));
        let (weight, bias, deviation) = solve(&sums.sums(), 1e-3);
        sluice_testkit::assert_close("weight", &weight, truth.f32(), 1e-3);
        sluice_testkit::assert_close("bias", &bias, &[3.0, 3.0], 1e-3);
        assert!(deviation.iter().all(|d| *d > 1.0 && *d < 10.0), "{deviation:?}");
    }

    #[test]
    fn labels_become_the_logarithm_of_their_rank_per_head() {
        let y = Tensor::from_vec(vec![-9.0, 0.5, 3.0, 0.1, -1.0, 0.4, 7.0, 0.3], [4, 2]);
        let want = [(4.0, 1.0), (2.0, 4.0), (3.0, 2.0), (1.0, 3.0f32)].map(|(a, b): (f32, f32)| [(4.0 / a).ln(), (4.0 / b).ln()]);
        assert_eq!(log_rank::minus_log_rank(&y).f32(), want.as_flattened());
    }

    #[test]
    fn sampled_positions_leave_out_sinks_and_cut_off_horizons() {
        let sampling = Sampling { samples: 100, readers_from: 32, n_sink: 4, seed: 1 };
        let positions = sampling.positions(2048, 0);
        assert_eq!(positions.len(), 100);
        assert!(positions[0] >= 4 && (positions[99] as usize) < 2048 - 32 - HORIZON);
        assert!(positions.windows(2).all(|w| w[0] < w[1]));
        assert_ne!(positions, sampling.positions(2048, 1));
        assert!(sampling.positions(1000, 0).is_empty());
    }
}
