//! One text that grows by prompts and answers, whichever program computes it: the float model or the int8 engine.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use sluice_data::Tokenizer;
use sluice_engine::{Artifact, Engine, Options, Sampler, Sequence};
use sluice_model::{AttentionPlan, Cache, Policy};
use sluice_spec::{RoutingConfig, TextConfig};
use sluice_tensor::Tensor;

use crate::models::{self, Loaded, RoutingArgs};

/// Prompt tokens that go through the float model at once.
const CHUNK: usize = 512;

/// A model that can continue texts, with its tokenizer.
pub(crate) enum Backend {
    /// A float model under a routing policy.
    Float {
        /// The model.
        loaded: Box<Loaded>,
        /// Who decides which keys are kept.
        plan: AttentionPlan,
    },
    /// An int8 artifact.
    Int8 {
        /// The engine.
        engine: Box<Engine>,
        /// From the artifact.
        tokenizer: Arc<Tokenizer>,
    },
}

impl Backend {
    /// Load what `--model` names. An artifact has its gates inside.
    pub(crate) fn open(model: &str, routing: &RoutingArgs) -> Result<Self> {
        if let Some(folder) = artifact_folder(model) {
            let (engine, tokenizer) = open_artifact(&folder, routing, false, 1)?;
            return Ok(Self::Int8 { engine: Box::new(engine), tokenizer: Arc::new(tokenizer) });
        }
        let loaded = models::load(model, routing.gates.as_deref())?;
        let plan = routing.plan(&loaded)?;
        ensure!(
            plan.policy.is_causal_and_static(),
            "policy {} needs the attention of the whole text and cannot generate; choose dense, gate, streaming or random",
            plan.policy.name()
        );
        Ok(Self::Float { loaded: Box::new(loaded), plan })
    }

    pub(crate) fn tokenizer(&self) -> &Arc<Tokenizer> {
        match self {
            Self::Float { loaded, .. } => &loaded.tokenizer,
            Self::Int8 { tokenizer, .. } => tokenizer,
        }
    }

    /// Vocabulary of the model.
    pub(crate) fn vocab_size(&self) -> usize {
        match self {
            Self::Float { loaded, .. } => loaded.model.config.vocab_size,
            Self::Int8 { engine, .. } => engine.model().vocab_size,
        }
    }

    /// Policy and numbers in a word each, for instance `gate, int8`.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Float { plan, .. } => plan.policy.name().to_string(),
            Self::Int8 { engine, .. } => format!("{}, int8 {}", artifact_policy(engine).name(), engine.instructions().name()),
        }
    }

    /// Who decides which keys are kept.
    pub(crate) fn policy(&self) -> Policy {
        match self {
            Self::Float { plan, .. } => plan.policy,
            Self::Int8 { engine, .. } => artifact_policy(engine),
        }
    }

    /// Where the model came from, for messages.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Float { loaded, .. } => loaded.checkpoint.path.display().to_string(),
            Self::Int8 { engine, .. } => engine.artifact().manifest.provenance.model.clone(),
        }
    }

    fn text(&self) -> &TextConfig {
        match self {
            Self::Float { loaded, .. } => &loaded.checkpoint.text,
            Self::Int8 { engine, .. } => &engine.artifact().manifest.text,
        }
    }

    /// An empty text.
    pub(crate) fn begin(&self) -> State {
        match self {
            Self::Float { loaded, plan } => State::Float(Cache::new(&loaded.model.config, *plan)),
            Self::Int8 { engine, .. } => State::Int8(Box::new(engine.new_sequence())),
        }
    }

    /// Read `prompt`, then generate up to `n` tokens or an end token; `show` gets the text as it comes.
    pub(crate) fn extend(
        &mut self,
        state: &mut State,
        sampler: &mut Sampler,
        prompt: &[u32],
        n: usize,
        mut show: impl FnMut(&str),
    ) -> Result<Outcome> {
        let started = Instant::now();
        sampler.observe(prompt);
        let mut next = self.read(state, sampler, prompt)?;
        let prefill_speed = prompt.len() as f64 / started.elapsed().as_secs_f64();
        let started = Instant::now();
        let (mut ids, mut text) = (Vec::new(), String::new());
        let tokenizer = Arc::clone(self.tokenizer());
        let mut decoder = tokenizer.stream();
        while ids.len() < n {
            ids.push(next);
            if self.text().eos.contains(&next) {
                break;
            }
            let piece = decoder.push(next);
            show(&piece);
            text.push_str(&piece);
            if ids.len() < n {
                next = self.read(state, sampler, &[next])?;
            }
        }
        let rest = decoder.finish();
        show(&rest);
        text.push_str(&rest);
        let decode_speed = ids.len() as f64 / started.elapsed().as_secs_f64();
        Ok(Outcome { text, ids, prefill_speed, decode_speed })
    }

    /// Continue by tokens and choose the next one.
    fn read(&mut self, state: &mut State, sampler: &mut Sampler, tokens: &[u32]) -> Result<u32> {
        match (self, state) {
            (Self::Float { loaded, .. }, State::Float(cache)) => {
                let (model, m) = (&loaded.model, loaded.model.config.d_model);
                let mut last = None;
                for chunk in tokens.chunks(CHUNK) {
                    let h = model.forward_cached(chunk, cache); // [1, T, M]
                    last = Some(Tensor::from_vec(h.f32()[(chunk.len() - 1) * m..].to_vec(), [1, m]));
                }
                let h = last.context("there are no tokens to read")?;
                Ok(sampler.sample(model.logits(&h).f32()).token)
            }
            (Self::Int8 { engine, .. }, State::Int8(sequence)) => Ok(sampler.sample(engine.extend(sequence, tokens)?).token),
            _ => bail!("a text of another model"),
        }
    }
}

/// What a model remembers of a text.
pub(crate) enum State {
    Float(Cache),
    Int8(Box<Sequence>),
}

impl State {
    /// Bytes of keys and values.
    pub(crate) fn cache_bytes(&self) -> u64 {
        match self {
            Self::Float(cache) => cache.bytes() as u64,
            Self::Int8(sequence) => sequence.cache_bytes() as u64,
        }
    }
}

/// What one call of [`Backend::extend`] produced.
pub(crate) struct Outcome {
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) prefill_speed: f64,
    pub(crate) decode_speed: f64,
}

/// The folder that `--model` names, when it is an artifact.
pub(crate) fn artifact_folder(model: &str) -> Option<PathBuf> {
    [PathBuf::from(model), PathBuf::from(models::MODELS).join(model)].into_iter().find(|path| Artifact::is_at(path))
}

/// Load an artifact for the engine, with the routing that the options ask for and room for `sequences` at once.
pub(crate) fn open_artifact(
    folder: &std::path::Path,
    options: &RoutingArgs,
    verify: bool,
    sequences: usize,
) -> Result<(Engine, Tokenizer)> {
    if let Some(gates) = &options.gates {
        bail!("{} is an artifact, which has its gates inside; give --gates {} to `sluice quantize`", folder.display(), gates.display());
    }
    let artifact = Artifact::open(folder, verify)?;
    let own = if artifact.manifest.has_gates { Policy::Gate } else { Policy::Streaming };
    if let Some(policy) = options.policy.filter(|policy| *policy != own) {
        bail!("{} was quantised for policy {}; it cannot run with {}", folder.display(), own.name(), policy.name());
    }
    let tokenizer = Tokenizer::from_json(&artifact.tokenizer, &artifact.manifest.text).with_context(|| folder.display().to_string())?;
    tokenizer.check_fits(artifact.manifest.model.vocab_size).with_context(|| folder.display().to_string())?;
    let stored = artifact.manifest.routing;
    // The kind of gate belongs to the artifact, the budget to whoever runs it.
    let routing = RoutingConfig { gate_heads: stored.gate_heads, ..options.routing(Some(stored))? };
    let defaults = Options::default();
    let (threads, chunk) = (rayon::current_num_threads(), defaults.chunk.max(sequences));
    let engine = Engine::new(artifact, Options { threads, chunk, sequences, routing: Some(routing), ..defaults })?;
    Ok((engine, tokenizer))
}

fn artifact_policy(engine: &Engine) -> Policy {
    if engine.artifact().manifest.has_gates { Policy::Gate } else { Policy::Streaming }
}
