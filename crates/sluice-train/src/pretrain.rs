//! Training a decoder from random weights, in phases of growing context: dense, or with gates and routed attention.
//! Knows nothing about where its batches come from: each is a function of the step.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sluice_autograd::Tape;
use sluice_kernels::adamw;
use sluice_model::train_memory::{self, StepShape};
use sluice_model::{AttentionPlan, Decoder, Forward};
use sluice_spec::ModelConfig;
use sluice_tensor::Device;

use crate::optimizer::Optimizer;
use crate::schedule::{OptimizerConfig, warm_up_cosine};
use crate::snapshot::{self, State};

/// A training run, from TOML.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Seed of weights and data order.
    pub seed: u64,
    /// Model to train.
    pub model: ModelConfig,
    /// AdamW and its schedule over all phases.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Mixture of the data.
    pub data: DataConfig,
    /// Phases in order.
    pub phases: Vec<Phase>,
    /// Keep only the residual stream between layers and recompute the rest in backward. Where a memory budget decides how many layers do
    /// (`--memory`, and always on a GPU), this is not read.
    #[serde(default)]
    pub checkpoint: bool,
}

/// Mixture of the training data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Share of the sequences that are generated recall documents; the rest are windows of text.
    pub recall_share: f64,
    /// Weight of an answer token of a recall document; other tokens have 1.
    pub answer_weight: f32,
    /// More text: UTF-8 files, documents separated by form feeds. The embedded texts are always there.
    #[serde(default)]
    pub text: Vec<String>,
}

/// Sequences of one step, padded to the longest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// `[B T]`.
    pub tokens: Vec<u32>,
    /// `[B T]` the token after each.
    pub targets: Vec<u32>,
    /// `[B T]` weight of each target in the loss; 0 for padding.
    pub weights: Vec<f32>,
    /// `[B]` tokens that are not padding.
    pub lens: Vec<usize>,
}

impl Batch {
    /// Put weighted sequences side by side; `weights[i]` is the weight of predicting token `i`, the first is ignored.
    /// Panics for a sequence of fewer than two tokens.
    #[track_caller]
    pub fn of(sequences: &[(Vec<u32>, Vec<f32>)]) -> Self {
        let t = sequences.iter().map(|(tokens, _)| tokens.len() - 1).max().unwrap_or(0);
        let mut batch = Self::default();
        for (tokens, weights) in sequences {
            assert!(tokens.len() >= 2 && tokens.len() == weights.len(), "{} tokens with {} weights", tokens.len(), weights.len());
            let n = tokens.len() - 1;
            let padding = t - n;
            batch.tokens.extend(tokens[..n].iter().copied().chain(std::iter::repeat_n(0, padding)));
            batch.targets.extend(tokens[1..].iter().copied().chain(std::iter::repeat_n(0, padding)));
            batch.weights.extend(weights[1..].iter().copied().chain(std::iter::repeat_n(0.0, padding)));
            batch.lens.push(n);
        }
        batch
    }
}

/// Steps at one context length.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// Steps.
    pub steps: u64,
    /// Tokens per sequence.
    pub context: usize,
    /// Sequences per step.
    pub batch: usize,
    /// Share of the sequences that are random tokens said twice or more, on which copying is learned fastest.
    #[serde(default)]
    pub copy_share: f64,
    /// Recall documents packed with facts and questions instead of long stretches of text between them.
    #[serde(default)]
    pub drill: bool,
}

/// What one step did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrainStep {
    /// Step, counted from 0 over all phases.
    pub step: u64,
    /// Tokens in the batch.
    pub tokens: usize,
    /// Weighted mean loss in nats.
    pub loss: f32,
    /// Mean loss of answer tokens (weight above 1), if there were any.
    pub answer_loss: Option<f32>,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f32,
    /// How often the host waited for a GPU before it read this report's figures at the end of the step.
    #[serde(default)]
    pub host_waits: u64,
    /// Seconds.
    pub seconds: f64,
}

#[derive(Serialize, Deserialize)]
struct Header {
    config: TrainConfig,
    step: u64,
    optimizer_step: u64,
}

/// A training run in progress.
pub struct Pretrainer {
    /// The model.
    pub model: Decoder,
    /// The run.
    pub config: TrainConfig,
    /// Attention of every layer: dense, unless somebody gives the model gates and asks for more.
    pub attention: AttentionPlan,
    /// Layers, from the first on, that run again in backward instead of keeping their activations: at first all or none, as
    /// the recipe says. No choice changes a bit of the result on a CPU.
    pub recompute: usize,
    /// Next step.
    pub step: u64,
    optimizer: Optimizer,
}

impl TrainConfig {
    /// Parse TOML; unknown keys are errors.
    pub fn from_toml(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text)?;
        config.model.validate()?;
        ensure!(!config.phases.is_empty(), "there is no [[phases]] entry; expected at least one");
        for phase in &config.phases {
            ensure!(
                phase.context >= 2 && phase.batch >= 1,
                "a phase has context {} and batch {}; expected at least 2 and 1",
                phase.context,
                phase.batch
            );
        }
        Ok(config)
    }

    /// Steps of all phases.
    pub fn steps(&self) -> u64 {
        self.phases.iter().map(|p| p.steps).sum()
    }

    /// Phase of a step.
    pub fn phase(&self, step: u64) -> &Phase {
        let mut end = 0;
        let found = self.phases.iter().find(|p| {
            end += p.steps;
            step < end
        });
        found.unwrap_or_else(|| &self.phases[self.phases.len() - 1])
    }
}

impl Pretrainer {
    /// Start from random weights.
    pub fn new(config: TrainConfig) -> Self {
        let mut model = Decoder::random(&config.model, config.seed);
        model.set_trainable(|_| true);
        let recompute = if config.checkpoint { config.model.n_layers } else { 0 };
        Self { model, config, attention: AttentionPlan::dense(), recompute, step: 0, optimizer: Optimizer::default() }
    }

    /// The fewest layers that run again so that no step holds more than `budget` bytes, counted from shapes and with a margin for what
    /// the count leaves out; gives back the count.
    pub fn fit_memory(&mut self, budget: u64) -> Result<u64> {
        let (model, device) = (&self.config.model, self.model.device());
        let Some(largest) = self.config.phases.iter().max_by_key(|phase| phase.batch * phase.context) else { return Ok(0) };
        let peak = |recompute| {
            let shape = StepShape::on(&device, largest.batch, largest.context, recompute);
            train_memory::step(model, &shape).peak_bytes
        };
        let found =
            (0..=model.n_layers).map(|recompute| (recompute, peak(recompute))).find(|(_, peak)| train_memory::with_margin(*peak) <= budget);
        let (recompute, peak) = found.with_context(|| {
            format!(
                "a step on {} x {} tokens needs {} MiB even with every layer run again, and {} MiB are allowed; lower `batch` or `context`, \
                 or allow more (--memory)",
                largest.batch,
                largest.context,
                train_memory::with_margin(peak(model.n_layers)).div_ceil(1 << 20),
                budget >> 20
            )
        })?;
        self.recompute = recompute;
        Ok(peak)
    }

    /// Go on on another device.
    pub fn to(mut self, device: &Device) -> Self {
        self.model = self.model.to(device);
        self.optimizer = self.optimizer.to(device);
        self
    }

    /// Continue at a saved state, if there is one, on the device of the present model. Returns whether there was.
    pub fn resume(&mut self, path: &Path) -> Result<bool> {
        let Some((header, mut state)) = snapshot::load::<Header>(path)? else { return Ok(false) };
        // Longer phases are welcome: that is how a run is extended.
        ensure!(
            header.config.model == self.config.model,
            "{} belongs to another model; give the same recipe, or another --out",
            path.display()
        );
        let device = self.model.device();
        self.optimizer = state.take_optimizer(header.optimizer_step).to(&device);
        for param in self.model.params_mut() {
            let Some(saved) = state.tensors.remove(&param.name) else { bail!("{} lacks {}", path.display(), param.name) };
            param.value = saved.to(&device);
        }
        self.step = header.step;
        Ok(true)
    }

    /// Save everything that [`Self::resume`] needs.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut state = State::default();
        for param in self.model.params() {
            state.tensors.insert(param.name.clone(), param.value.to(&Device::Cpu));
        }
        state.insert_optimizer(&self.optimizer);
        let header = Header { config: self.config.clone(), step: self.step, optimizer_step: self.optimizer.step };
        snapshot::save(path, &header, &state)
    }

    /// One step on a batch: forward, backward, clip, AdamW.
    pub fn step(&mut self, batch: &Batch) -> Result<TrainStep> {
        let started = Instant::now();
        let device = self.model.device();
        let waits = || device.gpu().map_or(0, |gpu| gpu.waits());
        let waits_before = waits();
        let tape = Tape::recording();
        let options = Forward { recompute: self.recompute, keep_layers: false };
        let hidden = self.model.forward(&tape, &batch.tokens, &batch.lens, &self.attention, options);
        let h = tape.reshape(&hidden.h, [batch.tokens.len(), self.config.model.d_model]);
        let sum: f32 = batch.weights.iter().sum();
        let weights: Vec<f32> = batch.weights.iter().map(|w| w / sum.max(1e-6)).collect();
        let (loss, queued) = tape.cross_entropy(&h, &tape.param(self.model.head()), &batch.targets, &weights);
        let mut grads = tape.backward_scalar(&loss).into_params();
        let c = &self.config.optimizer;
        let lr = c.lr * warm_up_cosine(self.step, self.config.steps(), c.warm_up, c.lr_floor);
        let grad_norm = self.optimizer.apply(self.model.params_mut(), &mut grads, c, |_| lr);
        // A negative slope would prefer the past more the longer it is gone, and the order of keys would not be static.
        for gate in self.model.layers.iter_mut().filter_map(|layer| Arc::make_mut(layer).gate.as_mut()) {
            adamw::raise_to_zero(&mut gate.recency.value);
        }
        // Everything is queued; from here on the host waits for what the report shows.
        let host_waits = waits() - waits_before;
        let grad_norm = grad_norm.item();
        if !grad_norm.is_finite() {
            bail!("the gradient of step {} is not finite; lower the learning rate", self.step);
        }
        let parts = queued.into_cross_entropy();
        let answers: Vec<f32> = batch.weights.iter().zip(&parts.nll).filter(|(w, _)| **w > 1.0).map(|(_, nll)| *nll).collect();
        let answer_loss = (!answers.is_empty()).then(|| answers.iter().sum::<f32>() / answers.len() as f32);
        let report = TrainStep {
            step: self.step,
            tokens: batch.lens.iter().sum(),
            loss: parts.weighted_sum(&weights),
            answer_loss,
            grad_norm: grad_norm as f64,
            lr,
            host_waits,
            seconds: started.elapsed().as_secs_f64(),
        };
        self.step += 1;
        Ok(report)
    }
}
