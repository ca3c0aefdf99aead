//! Finding and loading models by what a user types: a path, the name of a pulled model, or `tiny`, the embedded one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use sluice_data::Tokenizer;
use sluice_model::checkpoint::{self, Checkpoint};
use sluice_model::{AttentionPlan, Decoder, Policy};
use sluice_spec::{RoutingConfig, TokenizerSource};

/// Folder for pulled models, relative to the working directory.
pub(crate) const MODELS: &str = "models";

/// Name of the embedded model.
pub(crate) const TINY: &str = "tiny";

/// Files of the embedded model: a Hugging Face folder, made by `sluice train --config recipes/tiny-teacher.toml`.
const TINY_FILES: [(&str, &[u8]); 2] = [
    ("config.json", include_bytes!("../../../assets/tiny-teacher/config.json")),
    ("model.safetensors", include_bytes!("../../../assets/tiny-teacher/model.safetensors")),
];

/// A model with its tokenizer.
pub(crate) struct Loaded {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) model: Decoder,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// Routing stored with the gates, if the model has any.
    pub(crate) routing: Option<RoutingConfig>,
}

impl Loaded {
    /// Whether this is the embedded model, the only one that was trained on recall documents.
    pub(crate) fn is_tiny(&self) -> bool {
        self.checkpoint.path == Path::new(TINY)
    }
}

/// The embedded model, read the way every other one is: from a folder, here a temporary one.
fn embedded() -> Result<Checkpoint> {
    let folder = tempfile::tempdir().context("cannot create a temporary folder for the embedded model")?;
    for (name, bytes) in TINY_FILES {
        std::fs::write(folder.path().join(name), bytes)
            .with_context(|| format!("cannot unpack the embedded model to {}", folder.path().display()))?;
    }
    let mut checkpoint = checkpoint::load(folder.path())?;
    checkpoint.tokenizer = TokenizerSource::Missing; // the embedded texts bring their tokenizer
    checkpoint.path = PathBuf::from(TINY);
    Ok(checkpoint)
}

/// Load a model with the given gates, or else with those that lie in its folder.
pub(crate) fn load(model: &str, gates: Option<&Path>) -> Result<Loaded> {
    let (mut checkpoint, beside) = if model == TINY {
        (embedded()?, None)
    } else {
        let path = resolve(model)?;
        (checkpoint::load(&path)?, gates_beside(model, &path))
    };
    if let Some(path) = gates.or(beside.as_deref()) {
        checkpoint.gates = Some(checkpoint::load_gates(path, &checkpoint.config)?);
    }
    let decoder = Decoder::from_checkpoint(&checkpoint);
    let tokenizer = match model {
        TINY => sluice_data::embedded::tokenizer(),
        _ => Tokenizer::from_source(&checkpoint.tokenizer, &checkpoint.text)
            .with_context(|| format!("the tokenizer of {}", checkpoint.path.display()))?,
    };
    tokenizer.check_fits(checkpoint.config.vocab_size).with_context(|| checkpoint.path.display().to_string())?;
    let routing = checkpoint.gates.as_ref().map(|g| g.routing);
    // The decoder shares the tensors; what remains of the checkpoint is its metadata.
    checkpoint.tensors.clear();
    Ok(Loaded { checkpoint, model: decoder, tokenizer: Arc::new(tokenizer), routing })
}

/// Path of a model: an existing file or folder, or a model that was pulled.
pub(crate) fn resolve(model: &str) -> Result<PathBuf> {
    let given = PathBuf::from(model);
    let path = if given.exists() { given } else { Path::new(MODELS).join(model) };
    if !path.exists() {
        bail!(
            "no model at {model}, and none named so in {MODELS}/; give a GGUF file, a Hugging Face folder, or the name of a model that you pulled"
        );
    }
    if path.is_dir() && !path.join("config.json").exists() {
        let mut ggufs: Vec<PathBuf> =
            std::fs::read_dir(&path)?.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.extension().is_some_and(|e| e == "gguf")).collect();
        ggufs.sort();
        match ggufs.as_slice() {
            [one] => return Ok(one.clone()),
            [] => bail!("{} holds neither config.json nor a .gguf file", path.display()),
            many => bail!("{} holds {} .gguf files; name one of them", path.display(), many.len()),
        }
    }
    Ok(path)
}

/// The gate file in the folder of a GGUF file that was found there; a file that was named itself comes alone.
fn gates_beside(model: &str, found: &Path) -> Option<PathBuf> {
    let named_itself = Path::new(model) == found;
    let gates = found.parent()?.join(checkpoint::GATES_FILE);
    (!named_itself && found.is_file() && gates.is_file()).then_some(gates)
}

/// Which keys are kept: the options that every command with a routed model shares.
#[derive(Args, Clone, Debug)]
pub(crate) struct RoutingArgs {
    /// Who decides which keys are kept [default: gate if the model has gates, else dense]
    #[arg(long, value_name = "POLICY", value_parser = parse_policy)]
    pub(crate) policy: Option<Policy>,
    /// Named budget: paper, edge, default or long
    #[arg(long, value_name = "NAME")]
    pub(crate) preset: Option<String>,
    /// Routed keys per KV head
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Local keys, the query's own included
    #[arg(long, value_name = "W")]
    pub(crate) window: Option<usize>,
    /// The router decides every R positions
    #[arg(long, value_name = "R")]
    pub(crate) route_every: Option<usize>,
    /// Gate file for the model
    #[arg(long, value_name = "FILE")]
    pub(crate) gates: Option<PathBuf>,
}

impl RoutingArgs {
    /// The plan that these options ask of a loaded model.
    pub(crate) fn plan(&self, loaded: &Loaded) -> Result<AttentionPlan> {
        let routing = self.routing(loaded.routing)?;
        let policy = self.policy.unwrap_or(if loaded.model.has_gates() { Policy::Gate } else { Policy::Dense });
        if policy == Policy::Gate && !loaded.model.has_gates() {
            bail!(
                "policy gate needs gates, and {} has none; give --gates FILE or make them with `sluice distill`",
                loaded.checkpoint.path.display()
            );
        }
        Ok(AttentionPlan::new(policy, routing))
    }

    /// Routing: the preset, or else what is stored with the gates, with single options on top.
    pub(crate) fn routing(&self, stored: Option<RoutingConfig>) -> Result<RoutingConfig> {
        let base = match &self.preset {
            Some(name) => RoutingConfig::preset(name)?,
            None => stored.unwrap_or_default(),
        };
        let routing = RoutingConfig {
            top_k: self.top_k.unwrap_or(base.top_k),
            window: self.window.unwrap_or(base.window),
            route_every: self.route_every.unwrap_or(base.route_every),
            ..base
        };
        routing.validate()?;
        Ok(routing)
    }
}

/// Parse a policy name for clap.
pub(crate) fn parse_policy(name: &str) -> Result<Policy, String> {
    Policy::parse(name).ok_or_else(|| format!("expected one of {}", Policy::ALL.map(Policy::name).join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_come_with_a_folder_and_not_with_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let gguf = folder.path().join("model.gguf");
        std::fs::write(&gguf, "").unwrap();
        let name = folder.path().to_str().unwrap();
        assert_eq!(gates_beside(name, &gguf), None);
        let gates = folder.path().join(checkpoint::GATES_FILE);
        std::fs::write(&gates, "").unwrap();
        assert_eq!(gates_beside(name, &resolve(name).unwrap()), Some(gates));
        assert_eq!(gates_beside(gguf.to_str().unwrap(), &gguf), None);
    }
}
