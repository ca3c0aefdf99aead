//! Checkpoints on disk: reads Hugging Face folders and GGUF files, writes Hugging Face folders, and
//! keeps trained gates in a small file of their own. Everything comes out under Hugging Face names and
//! in Hugging Face's layout (half-split rotary positions). Knows nothing about how a model computes.
//!
//! A damaged file is an error that names the file, what was found and what was expected: sizes are
//! checked against the file before anything is allocated, and nothing is guessed.

mod bert;
mod export;
mod file;
mod gates;
mod gguf;
mod gguf_blocks;
mod gguf_model;
mod hf;
mod safetensors;
mod stored;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sluice_spec::{ConfigError, ModelConfig, TextConfig, TokenizerSource, tensor_names};
use sluice_tensor::Tensor;

pub use bert::{EncoderCheckpoint, load_encoder};
pub use export::export_hf;
pub use gates::{GATES_FILE, GateTensors, Gates, load_gates, save_gates};

/// A base model with everything that belongs to it, in memory.
pub struct Checkpoint {
    /// The file or folder that it came from.
    pub path: PathBuf,
    /// Shape of the model.
    pub config: ModelConfig,
    /// Weights by Hugging Face name, f32 or bf16 as stored; quantised and f16 ones are f32.
    /// Exactly the tensors of [`tensor_shapes`].
    pub tensors: BTreeMap<String, Tensor>,
    /// Where the tokenizer is.
    pub tokenizer: TokenizerSource,
    /// Special tokens and the chat template.
    pub text: TextConfig,
    /// Trained gates, when the folder holds them.
    pub gates: Option<Gates>,
}

/// A checkpoint that cannot be read or written; the message names the file, what was found and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: `open`, `read`, `write`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Its reason.
        source: std::io::Error,
    },
    /// The content is not what a reader can use.
    #[error("{}: found {found}; expected {expected}", path.display())]
    Unexpected {
        /// The file or folder.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What should be there, or what to do.
        expected: String,
    },
    /// The model's configuration cannot be used.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file that holds the configuration.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
}

impl CheckpointError {
    fn unexpected(path: &Path, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self::Unexpected { path: path.to_path_buf(), found: found.into(), expected: expected.into() }
    }

    fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }

    fn config(path: &Path, source: ConfigError) -> Self {
        Self::Config { path: path.to_path_buf(), source }
    }
}

/// Load a GGUF file or a Hugging Face folder (`config.json` and `model.safetensors`, sharded or not).
pub fn load(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let meta = std::fs::metadata(path).map_err(|e| CheckpointError::io("open", path, e))?;
    if meta.is_dir() {
        return hf::load(path);
    }
    let file = file::SizedFile::open(path)?;
    let magic = file.prefix::<4>()?;
    let has_extension = |name: &str| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(name));
    if magic == gguf::MAGIC || has_extension("gguf") {
        return gguf_model::load(file);
    }
    if has_extension("safetensors") {
        let found = if gates::is_gate_file(path) { "a gate file, which holds no base model" } else { "a single safetensors file" };
        let expected = "the folder around it with config.json and model.safetensors, or a .gguf file; gates are given beside a base model";
        return Err(CheckpointError::unexpected(path, found, expected));
    }
    let found = format!("a file that begins with {:?}", String::from_utf8_lossy(&magic));
    Err(CheckpointError::unexpected(path, found, "a GGUF file (begins with \"GGUF\") or a Hugging Face folder"))
}

/// Name and shape of every base tensor that a model of this config has, no more and no less.
pub fn tensor_shapes(config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let (m, f, d) = (config.d_model, config.d_ff, config.head_dim);
    let (q, kv) = (config.n_heads * d, config.n_kv_heads * d);
    let mut shapes = BTreeMap::new();
    shapes.insert(tensor_names::EMBED.to_string(), vec![config.vocab_size, m]);
    shapes.insert(tensor_names::FINAL_NORM.to_string(), vec![m]);
    if !config.tie_embeddings {
        shapes.insert(tensor_names::LM_HEAD.to_string(), vec![config.vocab_size, m]);
    }
    let mut parts = vec![
        ("input_layernorm.weight", vec![m]),
        ("self_attn.q_proj.weight", vec![q, m]),
        ("self_attn.k_proj.weight", vec![kv, m]),
        ("self_attn.v_proj.weight", vec![kv, m]),
        ("self_attn.o_proj.weight", vec![m, q]),
        ("post_attention_layernorm.weight", vec![m]),
        ("mlp.gate_proj.weight", vec![f, m]),
        ("mlp.up_proj.weight", vec![f, m]),
        ("mlp.down_proj.weight", vec![m, f]),
    ];
    if config.qkv_bias {
        parts.extend([("self_attn.q_proj.bias", vec![q]), ("self_attn.k_proj.bias", vec![kv]), ("self_attn.v_proj.bias", vec![kv])]);
    }
    if config.qk_norm {
        parts.extend([("self_attn.q_norm.weight", vec![d]), ("self_attn.k_norm.weight", vec![d])]);
    }
    for layer in 0..config.n_layers {
        for (part, shape) in &parts {
            shapes.insert(tensor_names::of_layer(layer, part), shape.clone());
        }
    }
    shapes
}

/// Check that `found` (shapes by name) is exactly what a model of this config has, so that a missing,
/// misshapen or unknown tensor is reported before any weight is read.
fn check_tensors<'a>(
    path: &Path,
    config: &ModelConfig,
    found: impl IntoIterator<Item = (&'a str, &'a [usize])>,
) -> Result<(), CheckpointError> {
    check_against(path, tensor_shapes(config), &describe(config), found)
}

/// The same for a model in words and the shapes that it wants.
fn check_against<'a>(
    path: &Path,
    mut wanted: BTreeMap<String, Vec<usize>>,
    model: &str,
    found: impl IntoIterator<Item = (&'a str, &'a [usize])>,
) -> Result<(), CheckpointError> {
    let n_wanted = wanted.len();
    for (name, shape) in found {
        match wanted.remove(name) {
            None => {
                let expected = format!("only the tensors of a {model}");
                return Err(CheckpointError::unexpected(path, format!("tensor `{name}` of shape {shape:?}"), expected));
            }
            Some(want) if want != shape => {
                return Err(CheckpointError::unexpected(path, format!("tensor `{name}` of shape {shape:?}"), format!("shape {want:?}")));
            }
            Some(_) => {}
        }
    }
    match wanted.first_key_value() {
        None => Ok(()),
        Some((name, shape)) => {
            let found = format!("{} of {n_wanted} tensors", n_wanted - wanted.len());
            Err(CheckpointError::unexpected(path, found, format!("also `{name}` of shape {shape:?} ({} missing in all)", wanted.len())))
        }
    }
}

/// The shape of a model in words, for messages that compare two.
fn describe(config: &ModelConfig) -> String {
    format!(
        "{} model of {} layers, d_model {}, d_ff {}, {} query and {} KV heads of width {}, vocabulary {}",
        config.architecture.name(),
        config.n_layers,
        config.d_model,
        config.d_ff,
        config.n_heads,
        config.n_kv_heads,
        config.head_dim,
        config.vocab_size
    )
}
