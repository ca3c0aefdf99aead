//! Progressive distillation of a dense model into a routed one, as a flat list of work items with a cursor:
//! resuming means continuing at the cursor, and every random choice is a hash of the seed and the item.
//!
//! While the base weights are frozen the teacher is the same weights with routing off, so there is no second model in
//! memory. Knows nothing about progress bars, files of reports or evaluation.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sluice_autograd::{Tape, Var};
use sluice_kernels::output_head::{self, DistillTerms, Wanted};
use sluice_kernels::{dense_attention, top_k_routing};
use sluice_model::decoder::is_gate;
use sluice_model::policy::{self, AttentionPlan, GateNoise, HORIZON, Policy};
use sluice_model::{Decoder, Forward};
use sluice_spec::RoutingConfig;
use sluice_tensor::Tensor;

use crate::curriculum::{self, Difficulty};
use crate::distill_config::DistillConfig;
use crate::documents::Documents;
use crate::gate_loss::{RankLabels, gate_loss};
use crate::hash::mix;
use crate::optimizer::Optimizer;
use crate::schedule::{annealed, ramped_budget, warm_up_cosine};
use crate::snapshot::{self, State};
use crate::warm_start::{Sampling, SlopeSearch, WarmStart};

/// One item of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Stage 0: add a document to the regression.
    Regress,
    /// Stage 0: solve the regressions, then search the slope on `slope_documents` documents.
    Solve,
    /// Stage 1, first half: every layer learns from the teacher's own input.
    LayerLocal(u64),
    /// Stage 1, second half: the student's errors pass through the stack.
    EndToEnd(u64),
    /// Stage 2: logits, gates alone.
    Logits(u64),
    /// Stage 2: logits, base weights too.
    LogitsAll(u64),
}

impl Work {
    /// Number of the stage.
    pub fn stage(self) -> u8 {
        match self {
            Self::Regress | Self::Solve => 0,
            Self::LayerLocal(_) | Self::EndToEnd(_) => 1,
            Self::Logits(_) | Self::LogitsAll(_) => 2,
        }
    }

    /// Name in reports and progress bars.
    pub fn name(self) -> &'static str {
        match self {
            Self::Regress => "stage 0: regression",
            Self::Solve => "stage 0: recency",
            Self::LayerLocal(_) => "stage 1: layer by layer",
            Self::EndToEnd(_) => "stage 1: end to end",
            Self::Logits(_) => "stage 2: logits",
            Self::LogitsAll(_) => "stage 2: all weights",
        }
    }
}

/// What one item did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StepReport {
    /// Which item.
    pub work: Work,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Main loss of the item; none for the closed form.
    pub loss: Option<f32>,
    /// Total budget in force.
    pub kv_budget: usize,
    /// Norm of the gradient before clipping.
    pub grad_norm: Option<f64>,
    /// Seconds.
    pub seconds: f64,
}

#[derive(Serialize, Deserialize)]
struct Header {
    config: DistillConfig,
    n_params: usize,
    cursor: usize,
    documents: u64,
    optimizer_step: u64,
    optimizer_of: Option<Work>,
    reports: Vec<StepReport>,
}

/// A distillation in progress.
pub struct Distiller {
    /// The student; its base weights are the teacher while they are frozen.
    pub model: Decoder,
    /// A second, larger model that gives the logits of stage 2.
    pub teacher: Option<Decoder>,
    /// The student's weights as they were, with routing off: the teacher. Shares their memory until they change.
    original: Decoder,
    /// The run.
    pub config: DistillConfig,
    /// Finished items.
    pub reports: Vec<StepReport>,
    documents: Documents,
    plan: Vec<Work>,
    cursor: usize,
    warm_start: WarmStart,
    optimizer: Optimizer,
    optimizer_of: Option<Work>,
}

/// Teacher's view of one document.
struct TeacherPass {
    /// `[1, T, M]` outputs of the attention blocks.
    blocks: Vec<Tensor>,
    /// `[n, G]` labels of the sampled positions.
    labels: Vec<Tensor>,
    /// Final hidden states `[1, T, M]`.
    h: Tensor,
}

impl Distiller {
    /// Start a run. The student gets gates if it has none; a second teacher must share the vocabulary.
    pub fn new(mut model: Decoder, teacher: Option<Decoder>, config: DistillConfig, documents: Documents) -> Result<Self> {
        config.validate()?;
        if let Some(teacher) = &teacher {
            let (s, t) = (model.config.vocab_size, teacher.config.vocab_size);
            ensure!(s == t, "the teacher has a vocabulary of {t} tokens and the student one of {s}; distillation needs the same tokenizer");
        }
        let original = model.clone();
        if !model.has_gates() {
            model.add_gates(config.routing.gate_heads);
        }
        let plan = config.plan();
        let warm_start = WarmStart::new(&model);
        let optimizer = Optimizer::default();
        Ok(Self {
            model,
            teacher,
            original,
            config,
            reports: Vec::new(),
            documents,
            plan,
            cursor: 0,
            warm_start,
            optimizer,
            optimizer_of: None,
        })
    }

    /// Continue at a saved state, if there is one. Returns whether there was.
    pub fn resume(&mut self, path: &Path) -> Result<bool> {
        let Some((header, mut state)) = snapshot::load::<Header>(path)? else { return Ok(false) };
        ensure!(
            header.config == self.config && header.n_params == self.model.config.n_params(),
            "{} belongs to a run with another configuration or model; give the same options to resume it, or another --out",
            path.display()
        );
        self.optimizer = state.take_optimizer(header.optimizer_step);
        self.optimizer_of = header.optimizer_of;
        if self.plan.get(header.cursor).is_some_and(|w| w.stage() == 0) {
            self.warm_start.restore(&mut state, header.documents)?;
        }
        for param in self.model.params_mut() {
            if let Some(saved) = state.tensors.remove(&param.name) {
                ensure!(saved.shape() == param.value.shape(), "{}: {} has another shape", path.display(), param.name);
                param.value = saved;
            }
        }
        self.cursor = header.cursor;
        self.reports = header.reports;
        Ok(true)
    }

    /// Save everything that [`Self::resume`] needs.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut state = State::default();
        let base_learns = self.plan.iter().any(|w| matches!(w, Work::LogitsAll(_)));
        for param in self.model.params() {
            if base_learns || is_gate(&param.name) {
                state.tensors.insert(param.name.clone(), param.value.clone());
            }
        }
        state.insert_optimizer(&self.optimizer);
        if self.plan.get(self.cursor).is_some_and(|w| w.stage() == 0) {
            self.warm_start.save_into(&mut state);
        }
        let header = Header {
            config: self.config.clone(),
            n_params: self.model.config.n_params(),
            cursor: self.cursor,
            documents: self.warm_start.documents,
            optimizer_step: self.optimizer.step,
            optimizer_of: self.optimizer_of,
            reports: self.reports.clone(),
        };
        snapshot::save(path, &header, &state)
    }

    /// Items done and items in all.
    pub fn progress(&self) -> (usize, usize) {
        (self.cursor, self.plan.len())
    }

    /// The item that [`Self::step`] will do next.
    pub fn next_work(&self) -> Option<Work> {
        self.plan.get(self.cursor).copied()
    }

    /// Do the next item; `None` when all are done.
    pub fn step(&mut self) -> Result<Option<StepReport>> {
        let Some(work) = self.next_work() else { return Ok(None) };
        let started = Instant::now();
        let stages = (std::mem::discriminant(&work), self.optimizer_of.as_ref().map(std::mem::discriminant));
        if stages.1 != Some(stages.0) {
            // Every stage has its own learning rate and schedule; moments of the last one would only mislead it.
            (self.optimizer, self.optimizer_of) = (Optimizer::default(), Some(work));
        }
        let mut report = match work {
            Work::Regress => self.regress(),
            Work::Solve => self.solve()?,
            Work::LayerLocal(step) => self.layer_local(step)?,
            Work::EndToEnd(step) => self.through_the_stack(work, step)?,
            Work::Logits(step) | Work::LogitsAll(step) => self.through_the_stack(work, step)?,
        };
        self.cursor += 1;
        report.seconds = started.elapsed().as_secs_f64();
        self.reports.push(report.clone());
        Ok(Some(report))
    }

    /// Document of the present item: a hash of the seed and the cursor.
    fn document(&self) -> Vec<u32> {
        self.documents.window(mix(self.config.seed, self.cursor as u64), self.config.context).to_vec()
    }

    fn sampling(&self) -> Sampling {
        let DistillConfig { routing, stage0, .. } = &self.config;
        let readers_from = routing.window.max(stage0.readers_from);
        Sampling { samples: stage0.samples, readers_from, n_sink: routing.n_sink, seed: self.config.seed }
    }

    fn regress(&mut self) -> StepReport {
        let tokens = self.document();
        let sampling = self.sampling();
        self.warm_start.add_document(&self.model, &tokens, &sampling);
        report(Work::Regress, tokens.len(), None, self.config.context, None)
    }

    fn solve(&mut self) -> Result<StepReport> {
        let deviations = self.warm_start.install(&mut self.model, self.config.stage0.lambda)?;
        let mut search = SlopeSearch::new(&self.model);
        let mut tokens = 0;
        for i in 0..self.config.stage0.slope_documents {
            let seed = mix(self.config.seed ^ 0x510F, i as u64);
            let document = self.documents.window(seed, self.config.context);
            search.add_document(&self.model, document, &self.config.routing, &self.config.budgets, &deviations);
            tokens += document.len();
        }
        search.install(&mut self.model, &deviations);
        Ok(report(Work::Solve, tokens, None, self.config.routing.kv_budget(), None))
    }

    /// Routing of a training step: the ramped budget, then a random one of the budgets to serve.
    fn step_routing(&self, step: u64, steps: u64) -> RoutingConfig {
        let schedule = &self.config.schedule;
        let target = self.config.routing.kv_budget();
        let ramped = ramped_budget(step, steps, schedule.ramp, self.config.context, target);
        let kv_budget = if ramped > target || self.config.budgets.is_empty() {
            ramped
        } else {
            let pick = mix(self.config.seed ^ 0xB0D6, self.cursor as u64) as usize % self.config.budgets.len();
            self.config.budgets[pick]
        };
        let temperature = annealed(step, steps, schedule.temperature_from, schedule.temperature_to);
        let routing = self.config.routing.with_kv_budget(kv_budget).expect("budgets were validated");
        RoutingConfig { gate_temperature: temperature, ..routing }
    }

    fn noise(&self, step: u64, steps: u64) -> Option<GateNoise> {
        let schedule = &self.config.schedule;
        let scale = schedule.noise * annealed(step, steps, schedule.temperature_from, schedule.temperature_to);
        (scale > 0.0).then_some(GateNoise { seed: mix(self.config.seed ^ 0x9A5E, self.cursor as u64), scale })
    }

    /// Stage 1, first half: `|o_S - o_T|^2 / |o_T|^2` of every layer, each fed the teacher's input.
    fn layer_local(&mut self, step: u64) -> Result<StepReport> {
        let tokens = self.document();
        let (t, steps) = (tokens.len(), self.config.stage1.layer_local_steps);
        let routing = self.step_routing(step, steps);
        let plan = AttentionPlan { policy: Policy::Gate, routing, noise: self.noise(step, steps) };
        let sampling = self.sampling();
        let samples = [sampling.positions(t, mix(self.config.seed, self.cursor as u64))];
        let weights = past_budget_weights(t, &routing);
        let positions: Vec<u32> = (0..t as u32).collect();
        self.model.set_trainable(is_gate);
        let frozen = Tape::frozen();
        let mut h = self.model.embed(&frozen, &tokens, 1);
        let mut grads = BTreeMap::new();
        let mut total = 0.0;
        for (index, layer) in self.model.layers.iter().enumerate() {
            let p = layer.project(&frozen, &h, &positions);
            let (o, lse) = dense_attention::fwd(p.q.value(), p.k.value(), p.v.value(), 0, &[t]);
            let labels = policy::future_attention_at(layer, h.value(), &p, &lse, &samples, &[t], sampling.readers_from);
            let block = layer.block_output(&frozen, &frozen.constant(o)); // the teacher's, [1, T, M]

            let tape = Tape::recording();
            let (o, scores) = plan.attend(&tape, layer, index, &h, &p, &[t]);
            let scores = scores.expect("the gate decided");
            let student = layer.block_output(&tape, &o);
            let features = tape.weighted_mse_rows(&student, block.value(), &weights);
            let slopes = &layer.gate.as_ref().expect("gates were added").recency.value;
            let rank = rank_labels(&samples[0], &labels[0], &routing, t);
            let loss = tape.add(&features, &gate_loss(&tape, &scores, slopes, rank, &self.config.gate_loss));
            total += features.value().item();
            grads.extend(tape.backward_scalar(&loss).into_params());
            h = layer.finish(&frozen, &h, &block);
        }
        let norm = self.update(&mut grads, step, steps, |c| c.stage1.lr, |_| 0.0)?;
        let loss = total / self.model.layers.len() as f32;
        Ok(report(Work::LayerLocal(step), t, Some(loss), routing.kv_budget(), Some(norm)))
    }

    /// Stage 1, second half, and stage 2: the routed student end to end against the dense teacher.
    fn through_the_stack(&mut self, work: Work, step: u64) -> Result<StepReport> {
        let tokens = self.document();
        let t = tokens.len();
        let (steps, base_lr) = match work {
            Work::EndToEnd(_) => (self.config.stage1.end_to_end_steps, 0.0),
            Work::Logits(_) => (self.config.stage2.gate_steps, 0.0),
            _ => (self.config.stage2.all_steps, self.config.stage2.base_lr),
        };
        // The gates have been through the ramp in the layer-local half; only a run without it ramps here.
        let ramped = matches!(work, Work::EndToEnd(_)) && self.config.stage1.layer_local_steps == 0;
        let routing = self.step_routing(if ramped { step } else { steps }, steps);
        let temperature = self.config.schedule.temperature_to;
        let routing = RoutingConfig { gate_temperature: temperature, ..routing };
        let plan = AttentionPlan { policy: Policy::Gate, routing, noise: self.noise(steps, steps) };
        let sampling = self.sampling();
        let samples = [sampling.positions(t, mix(self.config.seed, self.cursor as u64))];
        let taught = self.teach(&tokens, &samples, sampling.readers_from);
        let head = self.original.head().value.clone();
        let (teacher_h, teacher_head) = match &self.teacher {
            Some(teacher) => {
                let frozen = Tape::frozen();
                let hidden = teacher.forward(&frozen, &tokens, &[t], &AttentionPlan::dense(), Forward::default());
                (hidden.h.value().clone(), teacher.head().value.clone())
            }
            None => (taught.h.clone(), head.clone()),
        };

        self.model.set_trainable(|name| base_lr > 0.0 || is_gate(name));
        let tape = Tape::recording();
        let options = Forward { checkpoint: true, keep_layers: true };
        let student = self.model.forward(&tape, &tokens, &[t], &plan, options);
        let weights = past_budget_weights(t, &routing);
        let n_layers = self.model.layers.len() as f32;
        let mut features: Option<Var> = None;
        let mut gates: Option<Var> = None;
        let add = |sum: &mut Option<Var>, term: Var| *sum = Some(sum.take().map_or_else(|| term.clone(), |s| tape.add(&s, &term)));
        for (index, (kept, block)) in student.layers.iter().zip(&taught.blocks).enumerate() {
            add(&mut features, tape.weighted_mse_rows(&kept.block, block, &weights));
            let slopes = &self.model.layers[index].gate.as_ref().expect("gates were added").recency.value;
            let rank = rank_labels(&samples[0], &taught.labels[index], &routing, t);
            let scores = kept.scores.as_ref().expect("the gate decided");
            add(&mut gates, gate_loss(&tape, scores, slopes, rank, &self.config.gate_loss));
        }
        let features = tape.scale(&features.expect("a model has layers"), 1.0 / n_layers);
        let gates = tape.scale(&gates.expect("a model has layers"), 1.0 / n_layers);
        let (loss, shown) = if work.stage() == 1 {
            (tape.add(&features, &gates), features.value().item())
        } else {
            let weights = self.token_weights(&tokens, &weights, &teacher_h, &teacher_head, step, steps);
            let stage2 = &self.config.stage2;
            let terms = DistillTerms { kl: 1.0, boundary: stage2.boundary, temperature: stage2.temperature, ..DistillTerms::default() };
            let h = tape.reshape(&student.h, [t, self.model.config.d_model]);
            let teacher_h = teacher_h.reshape([t, teacher_h.last_dim()]);
            let (logits, parts) = tape.distill(&h, &tape.param(self.model.head()), &teacher_h, &teacher_head, None, &weights, terms);
            let shown = weights.iter().zip(&parts.kl).map(|(w, kl)| w * kl).sum::<f32>();
            let rest = tape.add(&tape.scale(&features, stage2.features), &gates);
            (tape.add(&logits, &rest), shown)
        };
        let mut grads = tape.backward_scalar(&loss).into_params();
        let norm = self.update(
            &mut grads,
            step,
            steps,
            |c| match work {
                Work::EndToEnd(_) => c.stage1.lr,
                Work::Logits(_) => c.stage2.gate_lr,
                _ => c.stage2.gate_lr_with_base,
            },
            |_| base_lr,
        )?;
        Ok(report(work, t, Some(shown), routing.kv_budget(), Some(norm)))
    }

    /// Dense pass of the original weights: block outputs, labels and final hidden states.
    fn teach(&self, tokens: &[u32], samples: &[Vec<u32>; 1], readers_from: usize) -> TeacherPass {
        let tape = Tape::frozen();
        let t = tokens.len();
        let positions: Vec<u32> = (0..t as u32).collect();
        let mut h = self.original.embed(&tape, tokens, 1);
        let (mut blocks, mut labels) = (Vec::new(), Vec::new());
        for layer in &self.original.layers {
            let p = layer.project(&tape, &h, &positions);
            let (o, lse) = dense_attention::fwd(p.q.value(), p.k.value(), p.v.value(), 0, &[t]);
            labels.extend(policy::future_attention_at(layer, h.value(), &p, &lse, samples, &[t], readers_from));
            let block = layer.block_output(&tape, &tape.constant(o));
            h = layer.finish(&tape, &h, &block);
            blocks.push(block.value().clone());
        }
        let h = tape.rms_norm(&h, Some(&tape.param(&self.original.final_norm)), self.original.config.norm_eps);
        TeacherPass { blocks, labels, h: h.value().clone() }
    }

    /// Weight of every position in the logit loss, summing to 1: positions past the budget, through the curriculum
    /// (confident tokens and a growing share of the rest), more for tokens that need far context.
    fn token_weights(&self, tokens: &[u32], past_budget: &[f32], h: &Tensor, head: &Tensor, step: u64, steps: u64) -> Vec<f32> {
        let t = tokens.len();
        let targets: Vec<u32> = tokens[1..].iter().copied().chain([0]).collect();
        let known: Vec<f32> = past_budget.iter().enumerate().map(|(i, &w)| if i + 1 < t && w > 0.0 { 1.0 } else { 0.0 }).collect();
        let all = output_head::cross_entropy(&h.reshape([t, h.last_dim()]), head, &targets, &known, Wanted::NOTHING);
        let local = self.config.stage2.long_range.then(|| {
            // What the last `window` tokens alone predict: routed attention with no routed keys.
            let routing = RoutingConfig { top_k: 0, n_sink: 0, ..self.config.routing };
            let plan = AttentionPlan::new(Policy::Streaming, routing);
            let hidden = self.original.forward(&Tape::frozen(), tokens, &[t], &plan, Forward::default()).h;
            let hidden = hidden.value().reshape([t, self.original.config.d_model]);
            output_head::cross_entropy(&hidden, &self.original.head().value, &targets, &known, Wanted::NOTHING).nll
        });
        let seed = mix(self.config.seed ^ 0xC0DE, self.cursor as u64);
        let mut weights: Vec<f32> = (0..t)
            .map(|i| {
                let gain = local.as_ref().map_or(0.0, |local| local[i] - all.nll[i]);
                let token = Difficulty { max_prob: all.max_prob[i], long_range_gain: gain };
                known[i] * curriculum::weight(&token, step, steps, mix(seed, i as u64))
            })
            .collect();
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum.max(1e-6));
        weights
    }

    /// Clip, step and project the slopes back to 0 or above.
    fn update(
        &mut self,
        grads: &mut BTreeMap<String, Tensor>,
        step: u64,
        steps: u64,
        gate_lr: impl Fn(&DistillConfig) -> f32,
        base_lr: impl Fn(&DistillConfig) -> f32,
    ) -> Result<f64> {
        let c = &self.config.optimizer;
        let factor = warm_up_cosine(step, steps, c.warm_up, c.lr_floor);
        let (gate, base) = (gate_lr(&self.config) * factor, base_lr(&self.config) * factor);
        let norm = self.optimizer.apply(self.model.params_mut(), grads, c, |name| if is_gate(name) { gate } else { base });
        if !norm.is_finite() {
            bail!("the gradient of item {} is not finite; lower the learning rate or look at the text around it", self.cursor);
        }
        for layer in &mut self.model.layers {
            let gate = std::sync::Arc::make_mut(layer).gate.as_mut().expect("gates were added");
            gate.recency.value.f32_mut().iter_mut().for_each(|c| *c = c.max(0.0));
        }
        Ok(norm)
    }

    /// Jaccard overlap of the routings that two sets of gates choose on one document, mean over layers, blocks and heads.
    pub fn routing_overlap(&self, other: &Decoder, tokens: &[u32]) -> f64 {
        let frozen = Tape::frozen();
        let positions: Vec<u32> = (0..tokens.len() as u32).collect();
        let budget = policy::budget(&self.config.routing);
        let mut h = self.model.embed(&frozen, tokens, 1);
        let (mut sum, mut n) = (0.0, 0.0);
        for (layer, twin) in self.model.layers.iter().zip(&other.layers) {
            let p = layer.project(&frozen, &h, &positions);
            let route =
                |l: &sluice_model::Layer| top_k_routing::route(l.score(&frozen, &p.x, &positions).value(), &[tokens.len()], &budget);
            let (a, b) = (route(layer), route(twin));
            for block in 0..a.n_blocks {
                for head in 0..a.n_kv_heads {
                    let (x, y) = (a.routed(0, block, head), b.routed(0, block, head));
                    if x.len() < budget.top_k {
                        continue; // everything is kept: the overlap says nothing
                    }
                    let both = x.iter().filter(|i| y.binary_search(i).is_ok()).count();
                    sum += both as f64 / (x.len() + y.len() - both) as f64;
                    n += 1.0;
                }
            }
            let o = dense_attention::fwd(p.q.value(), p.k.value(), p.v.value(), 0, &[tokens.len()]).0;
            h = layer.finish(&frozen, &h, &layer.block_output(&frozen, &frozen.constant(o)));
        }
        if n == 0.0 { 1.0 } else { sum / n }
    }
}

/// 1 / n on the n positions where routing takes something away, 0 before; uniform when it takes nothing.
fn past_budget_weights(t: usize, routing: &RoutingConfig) -> Vec<f32> {
    let from = if routing.kv_budget() + routing.route_every < t { routing.kv_budget() } else { 0 };
    let weight = 1.0 / (t - from) as f32;
    (0..t).map(|i| if i >= from { weight } else { 0.0 }).collect()
}

fn rank_labels<'a>(positions: &'a [u32], labels: &'a Tensor, routing: &RoutingConfig, t: usize) -> Option<RankLabels<'a>> {
    let candidates = t.saturating_sub(routing.window);
    let keep = routing.top_k as f32 / candidates.max(1) as f32;
    (!positions.is_empty() && keep < 1.0 && t > HORIZON).then_some(RankLabels { positions, labels, keep })
}

fn report(work: Work, tokens: usize, loss: Option<f32>, kv_budget: usize, grad_norm: Option<f64>) -> StepReport {
    StepReport { work, tokens, loss, kv_budget, grad_norm, seconds: 0.0 }
}
