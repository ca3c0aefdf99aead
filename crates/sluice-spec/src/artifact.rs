//! The quantised form of a model on disk, which is what conversion writes and the engine reads: a folder with this
//! manifest, one file of weights in the order of the kernels, and the tokenizer. Plain data; knows no file system.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::model::{ConfigError, ModelConfig};
use crate::routing::{GateHeads, RoutingConfig};
use crate::tokenizer::TextConfig;

/// The manifest's file name; a folder that has it is an artifact.
pub const MANIFEST_FILE: &str = "manifest.json";
/// File of all tensors.
pub const WEIGHTS_FILE: &str = "weights.bin";
/// Hugging Face tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// What `format` says.
pub const FORMAT: &str = "sluice-artifact";
/// What `version` says; a reader refuses anything newer.
pub const VERSION: u32 = 1;
/// Every tensor begins at a multiple of this many bytes.
pub const ALIGNMENT: usize = 64;

/// Everything about an artifact that is not a number of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Shape of the model; its rotary pairs are half-split.
    pub model: ModelConfig,
    /// Budget and rhythm that its gates were trained for.
    pub routing: RoutingConfig,
    /// Whether it has trained gates; without them every score is 0, which keeps the sinks and the most recent keys.
    pub has_gates: bool,
    /// Inputs that share a scale.
    pub group: usize,
    /// Special tokens and the chat template.
    pub text: TextConfig,
    /// The other files, by name.
    pub files: BTreeMap<String, FileEntry>,
    /// Tensors in [`WEIGHTS_FILE`], by name: exactly those of [`tensors`].
    pub tensors: BTreeMap<String, TensorEntry>,
    /// Where it comes from.
    pub provenance: Provenance,
    /// What the conversion cost, if it was measured.
    pub quality: Option<Quality>,
}

/// A file of the artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Length.
    pub bytes: u64,
    /// Digest in hexadecimal.
    pub sha256: String,
}

/// A tensor of the weights file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Shape and encoding.
    pub kind: TensorKind,
    /// First byte, a multiple of [`ALIGNMENT`].
    pub offset: u64,
}

/// Shape and encoding of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum TensorKind {
    /// `[rows, cols]` in int8: tiles of 16 rows, in each four inputs of every row after the other, stored plus 128;
    /// then f16 scales `[tiles, groups, 16]`.
    Int8 {
        /// Outputs.
        rows: usize,
        /// Inputs.
        cols: usize,
    },
    /// `len` numbers in little-endian f32.
    F32 {
        /// How many.
        len: usize,
    },
}

/// Where an artifact comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// Name of the base model's file or folder.
    pub model: String,
    /// Digest of the base model's weights, when they are one file.
    pub model_sha256: Option<String>,
    /// Digest of the gate file.
    pub gates_sha256: Option<String>,
    /// Program and version that wrote it.
    pub made_by: String,
}

/// Int8 against the float model with the same gates and routing, on a held-out text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quality {
    /// The text.
    pub text: String,
    /// Tokens that were compared.
    pub tokens: usize,
    /// Mean `KL(float || int8)` in nats.
    pub kl: f64,
    /// Share of tokens where both prefer the same one.
    pub top1_agreement: f64,
    /// Loss of int8 minus loss of float, nats per token.
    pub nll_difference: f64,
    /// Mean overlap (Jaccard) of the keys that float and int8 keep, over the text, layers and KV heads.
    pub routing_overlap: f64,
    /// As `nll_difference`, with int8 keeping the keys that float keeps: what is left is rounding. None without gates, where both keep the same.
    pub nll_difference_replayed: Option<f64>,
}

/// Names and kinds of the tensors that an artifact of this model has, no more and no less.
pub fn tensors(model: &ModelConfig, routing: &RoutingConfig, has_gates: bool) -> BTreeMap<String, TensorKind> {
    let (m, f, d) = (model.d_model, model.d_ff, model.head_dim);
    let (q, kv) = (model.n_heads * d, model.n_kv_heads * d);
    let int8 = |rows, cols| TensorKind::Int8 { rows, cols };
    let float = |len| TensorKind::F32 { len };
    let mut all = BTreeMap::from([(EMBED.to_string(), int8(model.vocab_size, m)), (FINAL_NORM.to_string(), float(m))]);
    if !model.tie_embeddings {
        all.insert(LM_HEAD.to_string(), int8(model.vocab_size, m));
    }
    let mut parts = vec![
        ("input_norm", float(m)),
        ("qkv", int8(q + 2 * kv, m)),
        ("o", int8(m, q)),
        ("post_norm", float(m)),
        ("gate_up", int8(2 * f, m)),
        ("down", int8(m, f)),
    ];
    if model.qkv_bias {
        parts.push(("qkv.bias", float(q + 2 * kv)));
    }
    if model.qk_norm {
        parts.extend([("q_norm", float(d)), ("k_norm", float(d))]);
    }
    if has_gates {
        let heads = gate_heads(model, routing);
        parts.extend([("gate.weight", float(heads * m)), ("gate.bias", float(heads)), ("gate.recency", float(heads))]);
    }
    for layer in 0..model.n_layers {
        all.extend(parts.iter().map(|(part, kind)| (of_layer(layer, part), *kind)));
    }
    all
}

/// Embedding, and the output head of a model whose embeddings are tied.
pub const EMBED: &str = "embed";
/// Output head of a model whose embeddings are not tied.
pub const LM_HEAD: &str = "lm_head";
/// Norm before the output head.
pub const FINAL_NORM: &str = "final_norm";

/// A tensor of a layer, for instance `of_layer(3, "qkv")`.
pub fn of_layer(layer: usize, part: &str) -> String {
    format!("layers.{layer}.{part}")
}

/// Scores that a layer's gate computes per token.
pub fn gate_heads(model: &ModelConfig, routing: &RoutingConfig) -> usize {
    match routing.gate_heads {
        GateHeads::KvHead => model.n_kv_heads,
        GateHeads::Shared => 1,
    }
}

impl Manifest {
    /// Parse and check a manifest. Format and version are looked at first, so that a newer artifact is called newer
    /// and not damaged.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let value: serde_json::Value = serde_json::from_str(text).map_err(|e| ConfigError::new(format!("found no valid JSON ({e})")))?;
        let format = value.get("format").and_then(serde_json::Value::as_str).unwrap_or("(missing)");
        if format != FORMAT {
            return Err(ConfigError::new(format!("found format `{format}`; expected `{FORMAT}`, a folder that `sluice quantize` wrote")));
        }
        let version = value.get("version").and_then(serde_json::Value::as_u64);
        if version != Some(VERSION as u64) {
            let found = version.map_or("none".to_string(), |v| v.to_string());
            return Err(ConfigError::new(format!(
                "found format version {found}; expected {VERSION}. Use a version of sluice that knows it, or quantise the model again"
            )));
        }
        let manifest: Self = serde_json::from_value(value).map_err(|e| ConfigError::new(format!("found a manifest with an error: {e}")))?;
        manifest.model.validate()?;
        manifest.routing.validate()?;
        let want = tensors(&manifest.model, &manifest.routing, manifest.has_gates);
        for (name, kind) in &want {
            match manifest.tensors.get(name) {
                Some(entry) if entry.kind == *kind => {}
                Some(entry) => return Err(ConfigError::new(format!("found tensor `{name}` as {:?}; expected {kind:?}", entry.kind))),
                None => return Err(ConfigError::new(format!("found no tensor `{name}`; expected {kind:?}"))),
            }
        }
        if let Some(name) = manifest.tensors.keys().find(|name| !want.contains_key(*name)) {
            return Err(ConfigError::new(format!("found a tensor `{name}`; expected only those of the model")));
        }
        for file in [WEIGHTS_FILE, TOKENIZER_FILE] {
            if !manifest.files.contains_key(file) {
                return Err(ConfigError::new(format!("found no entry for the file {file}; expected its size and digest")));
            }
        }
        if let Some(name) = manifest.files.keys().find(|name| ![WEIGHTS_FILE, TOKENIZER_FILE].contains(&name.as_str())) {
            return Err(ConfigError::new(format!("found an entry for the file `{name}`; expected {WEIGHTS_FILE} and {TOKENIZER_FILE}")));
        }
        Ok(manifest)
    }
}
