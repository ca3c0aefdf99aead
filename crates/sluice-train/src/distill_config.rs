//! Settings of a distillation, from TOML; every field has a default that suits SmolLM2-135M on two cores.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use sluice_model::policy::HORIZON;
use sluice_spec::RoutingConfig;

use crate::distill::Work;
use crate::gate_loss::GateLossTerms;
use crate::schedule::OptimizerConfig;

/// A distillation run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DistillConfig {
    /// Seed of every random choice.
    pub seed: u64,
    /// Tokens of a training window.
    pub context: usize,
    /// Routing of the student; its budget is the target of the ramp.
    pub routing: RoutingConfig,
    /// Total budgets that one student shall serve; one is drawn at random per step after the ramp.
    pub budgets: Vec<usize>,
    /// Documents whose gradients are averaged into one update, in the stages that pass through the stack.
    pub documents_per_step: usize,
    /// Keep only the residual stream between layers in those stages and recompute the rest in backward. Where a memory budget decides
    /// how many layers do (`--memory`, and always on a GPU), this is not read.
    pub checkpoint: bool,
    /// Closed form.
    pub stage0: Stage0,
    /// Features.
    pub stage1: Stage1,
    /// Logits.
    pub stage2: Stage2,
    /// Generalisation.
    pub stage3: Stage3,
    /// Ramp, temperature and noise.
    pub schedule: Schedule,
    /// Losses on the scores.
    pub gate_loss: GateLossTerms,
    /// AdamW; its learning rate is set by the stages.
    pub optimizer: OptimizerConfig,
}

/// Stage 0, the closed-form warm start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Stage0 {
    /// Documents of the regression; 0 skips the stage.
    pub documents: usize,
    /// Positions sampled per document.
    pub samples: usize,
    /// Readers of a key count from so many positions after it, or from the end of the window if that is further. Early
    /// readers say little about late ones, for which a key must be kept; recency serves them anyway.
    pub readers_from: usize,
    /// Strength of the ridge.
    pub lambda: f64,
    /// Documents of the slope search.
    pub slope_documents: usize,
}

/// Stage 1, feature alignment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Stage1 {
    /// Steps in which each layer is fed the teacher's input.
    pub layer_local_steps: u64,
    /// Steps through the whole stack.
    pub end_to_end_steps: u64,
    /// Peak learning rate of the gates.
    pub lr: f32,
}

/// Stage 2, logit alignment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Stage2 {
    /// Steps with gates alone.
    pub gate_steps: u64,
    /// Steps with base weights too; 0 leaves them frozen.
    pub all_steps: u64,
    /// Peak learning rate of the gates alone.
    pub gate_lr: f32,
    /// Peak learning rate of the gates while base weights learn.
    pub gate_lr_with_base: f32,
    /// Peak learning rate of the base weights.
    pub base_lr: f32,
    /// Temperature of the KL term, which is multiplied by its square.
    pub temperature: f32,
    /// Weight of the decision-boundary loss.
    pub boundary: f32,
    /// Weight of the feature loss.
    pub features: f32,
    /// Whether tokens that need far context weigh more (costs one cheap pass).
    pub long_range: bool,
}

/// Stage 3, generalisation: logits as in stage 2, gates alone, with noise on their scores; in some documents the student
/// also answers for embeddings moved in the direction that hurts it most.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Stage3 {
    /// Steps.
    pub steps: u64,
    /// Peak learning rate of the gates.
    pub gate_lr: f32,
    /// Share of the documents that are attacked.
    pub adversarial_share: f32,
    /// Length of the attack on a token, as a share of the typical length of an embedding.
    pub radius: f32,
    /// Gumbel noise on the scores as a multiple of `T_g`.
    pub noise: f32,
}

/// What changes over the steps of a stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// Share of the steps over which the budget shrinks to its target.
    pub ramp: f64,
    /// `T_g` at the first step of stage 1.
    pub temperature_from: f32,
    /// `T_g` at its last step and in stage 2.
    pub temperature_to: f32,
    /// Gumbel noise on the scores as a multiple of `T_g`.
    pub noise: f32,
    /// Keys beyond the budget that fade out instead of being dropped, as a share of `top_k`: through them the gate learns what it
    /// should have kept.
    pub overhang: f32,
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self {
            seed: 1,
            context: 4096,
            routing: RoutingConfig::default(),
            budgets: vec![256, 512, 1024, 2048],
            documents_per_step: 1,
            checkpoint: true,
            stage0: Stage0::default(),
            stage1: Stage1::default(),
            stage2: Stage2::default(),
            stage3: Stage3::default(),
            schedule: Schedule::default(),
            gate_loss: GateLossTerms::default(),
            optimizer: OptimizerConfig::default(),
        }
    }
}

impl Default for Stage0 {
    fn default() -> Self {
        Self { documents: 24, samples: 1000, readers_from: 512, lambda: 1.0, slope_documents: 4 }
    }
}

impl Default for Stage1 {
    fn default() -> Self {
        Self { layer_local_steps: 24, end_to_end_steps: 0, lr: 1e-3 }
    }
}

impl Default for Stage2 {
    fn default() -> Self {
        Self {
            gate_steps: 0,
            all_steps: 0,
            gate_lr: 3e-4,
            gate_lr_with_base: 1e-4,
            base_lr: 1e-5,
            temperature: 1.0,
            boundary: 0.1,
            features: 0.01,
            long_range: true,
        }
    }
}

impl Default for Stage3 {
    fn default() -> Self {
        Self { steps: 0, gate_lr: 1e-4, adversarial_share: 0.2, radius: 0.05, noise: 0.5 }
    }
}

impl Default for Schedule {
    fn default() -> Self {
        Self { ramp: 0.6, temperature_from: 1.0, temperature_to: 0.1, noise: 0.1, overhang: 1.0 }
    }
}

impl DistillConfig {
    /// Parse TOML; unknown keys are errors.
    pub fn from_toml(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text)?;
        config.validate()?;
        Ok(config)
    }

    /// Check what the stages rely on.
    pub fn validate(&self) -> Result<()> {
        self.routing.validate()?;
        ensure!(
            self.context > self.routing.kv_budget(),
            "context is {} and the budget {}: nothing would be routed away",
            self.context,
            self.routing.kv_budget()
        );
        for &kv_budget in &self.budgets {
            self.routing.with_kv_budget(kv_budget)?;
        }
        ensure!(self.documents_per_step >= 1, "documents_per_step is 0; a step needs at least one document");
        let labelled_from = self.routing.window.max(self.stage0.readers_from) + HORIZON + self.routing.n_sink;
        ensure!(
            self.stage0.documents == 0 || self.context > labelled_from,
            "context is {}, but stage 0 needs more than {labelled_from} tokens: a key counts its readers for {HORIZON} tokens, from {} on; \
             give a longer context or a smaller stage0.readers_from",
            self.context,
            self.routing.window.max(self.stage0.readers_from)
        );
        Ok(())
    }

    /// Leave out the stages that are not in `stages`.
    pub fn keep_stages(&mut self, stages: &[u8]) {
        if !stages.contains(&0) {
            self.stage0.documents = 0;
        }
        if !stages.contains(&1) {
            (self.stage1.layer_local_steps, self.stage1.end_to_end_steps) = (0, 0);
        }
        if !stages.contains(&2) {
            (self.stage2.gate_steps, self.stage2.all_steps) = (0, 0);
        }
        if !stages.contains(&3) {
            self.stage3.steps = 0;
        }
    }

    /// The run as a list of items.
    pub fn plan(&self) -> Vec<Work> {
        let mut plan = vec![Work::Regress; self.stage0.documents];
        if self.stage0.documents > 0 {
            plan.push(Work::Solve);
        }
        plan.extend((0..self.stage1.layer_local_steps).map(Work::LayerLocal));
        plan.extend((0..self.stage1.end_to_end_steps).map(Work::EndToEnd));
        plan.extend((0..self.stage2.gate_steps).map(Work::Logits));
        plan.extend((0..self.stage2.all_steps).map(Work::LogitsAll));
        plan.extend((0..self.stage3.steps).map(Work::Generalise));
        plan
    }
}
