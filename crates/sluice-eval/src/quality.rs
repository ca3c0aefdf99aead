//! Quality against budget: every policy beside dense attention on the same positions of held-out windows.

use std::cell::OnceCell;

use anyhow::Result;
use sluice_autograd::Tape;
use sluice_kernels::output_head::{self, DistillTerms, Wanted};
use sluice_model::{AttentionPlan, Decoder, Forward, Policy};
use sluice_spec::RoutingConfig;
use sluice_tensor::Tensor;

use crate::bootstrap::{Bootstrap, Estimate};
use crate::measured::Measured;
use crate::report::{QualityRow, QualityTable};

/// What to compare.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Window, rhythm and sinks; the budget varies.
    pub routing: RoutingConfig,
    /// Total budgets, `window + top_k`.
    pub budgets: Vec<usize>,
    /// Policies beside dense.
    pub policies: Vec<Policy>,
}

impl Comparison {
    /// Policies and budgets, in the order in which they are run.
    pub fn cells(&self) -> Vec<(Policy, RoutingConfig)> {
        let at = |kv_budget| self.routing.with_kv_budget(kv_budget).ok();
        let cells = self.budgets.iter().filter_map(|&b| at(b)).flat_map(|r| self.policies.iter().map(move |&p| (p, r)));
        cells.collect()
    }
}

/// Final hidden states of dense attention over a window, `[T, M]`, which every policy is compared with.
pub fn dense_hidden(model: &Decoder, tokens: &[u32]) -> Tensor {
    hidden(model, tokens, &AttentionPlan::dense())
}

fn hidden(model: &Decoder, tokens: &[u32], plan: &AttentionPlan) -> Tensor {
    let h = model.forward(&Tape::frozen(), tokens, &[tokens.len()], plan, Forward::default()).h;
    h.value().reshape([tokens.len(), model.config.d_model])
}

/// One policy beside dense on one window, per scored token.
#[derive(Clone, Debug, Default)]
pub struct Compared {
    /// Negative log-likelihood under the policy.
    pub nll: Vec<f32>,
    /// The same under dense attention.
    pub nll_dense: Vec<f32>,
    /// `KL(dense || policy)`.
    pub kl: Vec<f32>,
    /// 1 where both prefer the same token.
    pub agree: Vec<f32>,
    /// 1 where the policy's first choice is the token that follows.
    pub hit: Vec<f32>,
}

/// Score tokens `from..` of a window, `from >= 1`, under a policy and under dense attention.
#[track_caller]
pub fn compare(model: &Decoder, tokens: &[u32], dense: &Tensor, plan: &AttentionPlan, from: usize) -> Compared {
    assert!(from >= 1, "the first token of a window has nothing to be predicted from");
    let t = tokens.len();
    if from >= t {
        return Compared::default();
    }
    let h = hidden(model, tokens, plan);
    let head = &model.head().value;
    let targets: Vec<u32> = tokens[1..].iter().copied().chain([0]).collect();
    let weights: Vec<f32> = (0..t).map(|i| if i + 1 >= from && i + 1 < t { 1.0 } else { 0.0 }).collect();
    let terms = DistillTerms { kl: 1.0, ce: 0.0, boundary: 0.0, temperature: 1.0, ..DistillTerms::default() };
    let rows = output_head::distill(&h, head, dense, head, Some(&targets), &weights, terms, Wanted::NOTHING);
    let scored = from - 1..t - 1;
    Compared {
        nll: rows.nll_student[scored.clone()].to_vec(),
        nll_dense: rows.nll_teacher[scored.clone()].to_vec(),
        kl: rows.kl[scored.clone()].to_vec(),
        agree: rows.agree[scored.clone()].iter().map(|&a| if a { 1.0 } else { 0.0 }).collect(),
        hit: rows.top1_student[scored].iter().zip(&tokens[from..]).map(|(a, b)| if a == b { 1.0 } else { 0.0 }).collect(),
    }
}

/// Compare policies on held-out windows of one text, only on positions past each budget; what `measured` has is not
/// made again. `progress` hears about every pass of the model.
pub fn quality_table(
    model: &Decoder,
    text: &str,
    windows: &[Vec<u32>],
    comparison: &Comparison,
    measured: &Measured,
    mut progress: impl FnMut(),
) -> Result<QualityTable> {
    let cells = comparison.cells();
    let mut compared: Vec<Vec<Compared>> = vec![Vec::new(); cells.len()];
    for tokens in windows {
        let dense = OnceCell::new();
        for ((policy, routing), compared) in cells.iter().zip(&mut compared) {
            let from = routing.kv_budget();
            let make = || {
                let dense = dense.get_or_init(|| dense_hidden(model, tokens));
                compare(model, tokens, dense, &AttentionPlan::new(*policy, *routing), from)
            };
            compared.push(measured.or_make(tokens, *policy, routing, from, make)?);
            progress();
        }
    }
    let bootstrap = Bootstrap::default();
    let mut rows = Vec::new();
    let mut dense_nll: Option<(usize, Estimate)> = None;
    for ((policy, routing), documents) in cells.iter().zip(&compared) {
        let pick = |f: fn(&Compared) -> &Vec<f32>| -> Vec<&Vec<f32>> { documents.iter().map(f).collect() };
        let (nll, base) = (pick(|c| &c.nll), pick(|c| &c.nll_dense));
        let Some(delta_nll) = bootstrap.paired_difference(&nll, &base) else { continue };
        let kv_budget = routing.kv_budget();
        if dense_nll.is_none_or(|(smallest, _)| kv_budget < smallest) {
            dense_nll = bootstrap.mean(&base).map(|e| (kv_budget, e));
        }
        let streaming = cells.iter().position(|(p, r)| *p == Policy::Streaming && r.kv_budget() == kv_budget);
        let baseline =
            streaming.filter(|_| *policy != Policy::Streaming).map(|s| -> Vec<&Vec<f32>> { compared[s].iter().map(|c| &c.nll).collect() });
        let gap_closed = baseline.as_ref().and_then(|baseline| bootstrap.gap_closed(&nll, baseline, &base));
        let above_streaming = baseline.as_ref().and_then(|baseline| bootstrap.paired_difference(&nll, baseline));
        rows.push(QualityRow {
            policy: policy.name().into(),
            kv_budget,
            positions_from: kv_budget,
            delta_nll,
            kl: bootstrap.mean(&pick(|c| &c.kl)),
            top1_agreement: bootstrap.mean(&pick(|c| &c.agree)),
            gap_closed,
            above_streaming,
        });
    }
    Ok(QualityTable {
        text: text.into(),
        held_out: true,
        context: windows.iter().map(Vec::len).max().unwrap_or(0),
        n_documents: windows.len(),
        dense_nll: dense_nll.map(|(_, e)| e),
        rows,
        ..QualityTable::default()
    })
}
