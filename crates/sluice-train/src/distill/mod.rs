//! Progressive distillation of a dense model into a routed one, as a flat list of work items with a cursor:
//! resuming means continuing at the cursor, and every random choice is a hash of the seed and the item.
//!
//! While the base weights are frozen the teacher is the same weights with routing off, so there is no second model in
//! memory. Knows nothing about progress bars, files of reports or evaluation.

mod layer_local;
mod memory;
mod through_the_stack;

pub use memory::Split;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sluice_kernels::adamw;
use sluice_model::Decoder;
use sluice_model::decoder::is_gate;
use sluice_model::policy::{AttentionPlan, GateNoise, HORIZON, Policy};
use sluice_spec::RoutingConfig;
use sluice_tensor::{Device, Tensor};

use crate::distill_config::DistillConfig;
use crate::documents::Documents;
use crate::gate_loss::RankLabels;
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
    /// Stage 3: logits under attack, gates alone.
    Generalise(u64),
}

impl Work {
    /// Number of the stage.
    pub fn stage(self) -> u8 {
        match self {
            Self::Regress | Self::Solve => 0,
            Self::LayerLocal(_) | Self::EndToEnd(_) => 1,
            Self::Logits(_) | Self::LogitsAll(_) => 2,
            Self::Generalise(_) => 3,
        }
    }

    /// Whether the student's errors pass through its whole stack, as [`Split`] says.
    pub fn passes_through_the_stack(self) -> bool {
        !matches!(self, Self::Regress | Self::Solve | Self::LayerLocal(_))
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
            Self::Generalise(_) => "stage 3: generalisation",
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
    /// How often the host waited for a GPU before it read this report's figures at the end of the item.
    #[serde(default)]
    pub host_waits: u64,
}

/// What one item did, as long as the figures are where they were computed: reading them waits for the item.
struct QueuedReport {
    tokens: usize,
    kv_budget: usize,
    loss: Option<Tensor>,
    grad_norm: Option<Tensor>,
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
    /// How the documents of a step go through the stack; no part of the run's configuration.
    pub split: Split,
    documents: Documents,
    plan: Vec<Work>,
    cursor: usize,
    warm_start: WarmStart,
    optimizer: Optimizer,
    optimizer_of: Option<Work>,
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
        let split = Split::of(&config, model.config.n_layers);
        let optimizer = Optimizer::default();
        Ok(Self {
            model,
            teacher,
            original,
            config,
            reports: Vec::new(),
            split,
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
        let device = self.model.device();
        self.optimizer = state.take_optimizer(header.optimizer_step).to(&device);
        self.optimizer_of = header.optimizer_of;
        if self.plan.get(header.cursor).is_some_and(|w| w.stage() == 0) {
            self.warm_start.restore(&mut state, header.documents)?;
        }
        for param in self.model.params_mut() {
            if let Some(saved) = state.tensors.remove(&param.name) {
                ensure!(saved.shape() == param.value.shape(), "{}: {} has another shape", path.display(), param.name);
                param.value = saved.to(&device);
            }
        }
        self.cursor = header.cursor;
        self.reports = header.reports;
        Ok(true)
    }

    /// Save everything that [`Self::resume`] needs.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut state = State::default();
        let base_learns = self.base_learns();
        for param in self.model.params() {
            if base_learns || is_gate(&param.name) {
                state.tensors.insert(param.name.clone(), param.value.to(&Device::Cpu));
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
        let device = self.model.device();
        let waits = || device.gpu().map_or(0, |gpu| gpu.waits());
        let waits_before = waits();
        let queued = match work {
            Work::Regress => self.regress(),
            Work::Solve => self.solve()?,
            Work::LayerLocal(step) => self.layer_local(step),
            Work::EndToEnd(step) | Work::Logits(step) | Work::LogitsAll(step) | Work::Generalise(step) => {
                self.through_the_stack(work, step)
            }
        };
        let host_waits = waits() - waits_before;
        let QueuedReport { tokens, kv_budget, loss, grad_norm } = queued;
        let [loss, grad_norm] = [loss, grad_norm].map(|figure| figure.map(|figure| figure.item()));
        if grad_norm.is_some_and(|norm| !norm.is_finite()) {
            bail!("the gradient of item {} is not finite; lower the learning rate or look at the text around it", self.cursor);
        }
        self.cursor += 1;
        let (grad_norm, seconds) = (grad_norm.map(f64::from), started.elapsed().as_secs_f64());
        let report = StepReport { work, tokens, loss, kv_budget, grad_norm, seconds, host_waits };
        self.reports.push(report.clone());
        Ok(Some(report))
    }

    /// Whether the plan trains all weights at some point, not the gates alone.
    fn base_learns(&self) -> bool {
        self.plan.iter().any(|work| matches!(work, Work::LogitsAll(_)))
    }

    /// Number that the random choices for one document of the present item are drawn from.
    fn item(&self, which: u64) -> u64 {
        if which == 0 { self.cursor as u64 } else { mix(self.cursor as u64, which) }
    }

    /// One of the documents of the present item: a hash of the seed and the cursor.
    fn document(&self, which: u64) -> Vec<u32> {
        self.documents.window(mix(self.config.seed, self.item(which)), self.config.context).to_vec()
    }

    fn sampling(&self) -> Sampling {
        let DistillConfig { routing, stage0, .. } = &self.config;
        let readers_from = routing.window.max(stage0.readers_from);
        Sampling { samples: stage0.samples, readers_from, n_sink: routing.n_sink, seed: self.config.seed }
    }

    /// Positions of a document of `len` tokens whose labels `L_rank` compares; none where it has no weight.
    fn ranked_positions(&self, len: usize, salt: u64) -> Vec<u32> {
        if self.config.gate_loss.rank == 0.0 { Vec::new() } else { self.sampling().positions(len, mix(self.config.seed, salt)) }
    }

    fn regress(&mut self) -> QueuedReport {
        let tokens = self.document(0);
        let sampling = self.sampling();
        self.warm_start.add_document(&self.model, &tokens, &sampling);
        QueuedReport { tokens: tokens.len(), kv_budget: self.config.context, loss: None, grad_norm: None }
    }

    fn solve(&mut self) -> Result<QueuedReport> {
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
        Ok(QueuedReport { tokens, kv_budget: self.config.routing.kv_budget(), loss: None, grad_norm: None })
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

    fn student_plan(&self, routing: RoutingConfig, noise: Option<GateNoise>) -> AttentionPlan {
        let overhang = (self.config.schedule.overhang * routing.top_k as f32) as usize;
        AttentionPlan { policy: Policy::Gate, routing, noise, overhang }
    }

    fn noise(&self, step: u64, steps: u64) -> Option<GateNoise> {
        let schedule = &self.config.schedule;
        self.gate_noise(schedule.noise * annealed(step, steps, schedule.temperature_from, schedule.temperature_to))
    }

    fn gate_noise(&self, scale: f32) -> Option<GateNoise> {
        (scale > 0.0).then_some(GateNoise { seed: mix(self.config.seed ^ 0x9A5E, self.cursor as u64), scale })
    }

    /// Clip, step and project the slopes back to 0 or above. Gives back the norm of the gradient, not read yet.
    fn update(&mut self, grads: &mut BTreeMap<String, Tensor>, step: u64, steps: u64, gate_lr: f32, base_lr: f32) -> Tensor {
        let c = &self.config.optimizer;
        let factor = warm_up_cosine(step, steps, c.warm_up, c.lr_floor);
        let (gate, base) = (gate_lr * factor, base_lr * factor);
        let norm = self.optimizer.apply(self.model.params_mut(), grads, c, |name| if is_gate(name) { gate } else { base });
        for layer in &mut self.model.layers {
            let gate = std::sync::Arc::make_mut(layer).gate.as_mut().expect("gates were added");
            adamw::raise_to_zero(&mut gate.recency.value);
        }
        norm
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
