//! Hugging Face folders of encoders of the BERT family, and what sentence-transformers writes beside them: how states become one vector.
//! Knows nothing about decoders.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sluice_spec::EncoderConfig;
use sluice_spec::tensor_names::bert as names;
use sluice_tensor::Tensor;

use super::file::read_text;
use super::hf::{CONFIG, TOKENIZER, Weights, parse_json};
use super::{CheckpointError, check_against};

/// What a model for sentences has beside the encoder; a plain encoder has neither file.
const POOLING: &str = "1_Pooling/config.json";
const SENTENCES: &str = "sentence_bert_config.json";

/// Prefix of the encoder in checkpoints that hold heads for pre-training beside it.
const PREFIX: &str = "bert.";

/// Tensors that are no part of the encoder: a head over the first token, heads for pre-training, a buffer with the numbers 0, 1, 2...
const BESIDE: [&str; 3] = ["pooler.", "cls.", "embeddings.position_ids"];

/// An encoder with everything that belongs to it, in memory.
pub struct EncoderCheckpoint {
    /// The folder.
    pub path: PathBuf,
    /// Shape of the model.
    pub config: EncoderConfig,
    /// Weights by name, exactly those of the encoder, f32 or bf16 as stored.
    pub tensors: BTreeMap<String, Tensor>,
    /// `tokenizer.json` of the folder.
    pub tokenizer: PathBuf,
    /// Tokens that a text may have, the special ones included; longer texts are to be cut.
    pub max_tokens: usize,
}

/// Load the folder of an encoder whose vector of a text is the mean of its states. Another way of pooling is an error.
pub fn load_encoder(folder: &Path) -> Result<EncoderCheckpoint, CheckpointError> {
    let config_path = folder.join(CONFIG);
    if !config_path.is_file() {
        return Err(CheckpointError::unexpected(folder, format!("no {CONFIG}"), "the Hugging Face folder of an encoder (BERT)"));
    }
    let config = EncoderConfig::from_hf_json(&read_text(&config_path)?).map_err(|e| CheckpointError::config(&config_path, e))?;
    let tokenizer = folder.join(TOKENIZER);
    if !tokenizer.is_file() {
        let expected = "it beside the weights; a vocab.txt alone must be converted with transformers' BertTokenizerFast first";
        return Err(CheckpointError::unexpected(folder, format!("no {TOKENIZER}"), expected));
    }
    check_pooling(&folder.join(POOLING))?;
    let max_tokens = max_tokens(&folder.join(SENTENCES), config.max_seq_len)?;

    let weights = Weights::open(folder)?;
    // Name in the file by the encoder's own name.
    let mut stored: BTreeMap<&str, &String> = BTreeMap::new();
    for name in weights.place.keys() {
        let own = name.strip_prefix(PREFIX).unwrap_or(name);
        if BESIDE.iter().any(|beside| own.starts_with(beside)) {
            continue;
        }
        if let Some(twice) = stored.insert(own, name) {
            return Err(CheckpointError::unexpected(folder, format!("`{twice}` and `{name}`"), "one of them"));
        }
    }
    let shapes = stored.iter().map(|(own, name)| (*own, weights.file_of(name).tensors[*name].shape.as_slice()));
    check_against(folder, tensor_shapes(&config), &describe(&config), shapes)?;
    let mut tensors = BTreeMap::new();
    for (own, name) in stored {
        tensors.insert(own.to_string(), weights.file_of(name).read(name)?);
    }
    Ok(EncoderCheckpoint { path: folder.to_path_buf(), config, tensors, tokenizer, max_tokens })
}

/// Name and shape of every tensor of an encoder.
fn tensor_shapes(config: &EncoderConfig) -> BTreeMap<String, Vec<usize>> {
    let (m, f) = (config.d_model, config.d_ff);
    let mut shapes = BTreeMap::new();
    for (name, rows) in [(names::WORDS, config.vocab_size), (names::POSITIONS, config.max_seq_len), (names::TYPES, config.n_types)] {
        shapes.insert(name.to_string(), vec![rows, m]);
    }
    let mut with_bias = |name: String, weight: &[usize]| {
        shapes.insert(format!("{name}.bias"), weight[..1].to_vec());
        shapes.insert(format!("{name}.weight"), weight.to_vec());
    };
    with_bias(names::NORM.into(), &[m]);
    for layer in 0..config.n_layers {
        let mut of = |part: &str, weight: &[usize]| with_bias(names::of_layer(layer, part), weight);
        for part in ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"] {
            of(part, &[m, m]);
        }
        of("attention.output.LayerNorm", &[m]);
        of("intermediate.dense", &[f, m]);
        of("output.dense", &[m, f]);
        of("output.LayerNorm", &[m]);
    }
    shapes
}

fn describe(config: &EncoderConfig) -> String {
    let EncoderConfig { n_layers, d_model, d_ff, n_heads, vocab_size, .. } = config;
    format!("bert model of {n_layers} layers, hidden size {d_model}, intermediate {d_ff}, {n_heads} heads, vocabulary {vocab_size}")
}

/// A folder that says how to pool must say: the mean, and nothing else.
fn check_pooling(path: &Path) -> Result<(), CheckpointError> {
    if !path.is_file() {
        return Ok(());
    }
    let root = parse_json(path, &read_text(path)?)?;
    let modes =
        root.as_object().into_iter().flatten().filter(|(key, value)| key.starts_with("pooling_mode_") && **value == Value::Bool(true));
    let modes: Vec<&str> = modes.map(|(key, _)| key.as_str()).collect();
    if modes == ["pooling_mode_mean_tokens"] {
        return Ok(());
    }
    Err(CheckpointError::unexpected(path, format!("pooling by {modes:?}"), "pooling_mode_mean_tokens alone; other ways are not supported"))
}

fn max_tokens(path: &Path, positions: usize) -> Result<usize, CheckpointError> {
    if !path.is_file() {
        return Ok(positions);
    }
    let root = parse_json(path, &read_text(path)?)?;
    match root.get("max_seq_length") {
        None | Some(Value::Null) => Ok(positions),
        Some(n) => n.as_u64().map(|n| n as usize).filter(|n| (3..=positions).contains(n)).ok_or_else(|| {
            CheckpointError::unexpected(path, format!("`max_seq_length` {n}"), format!("a whole number from 3 to {positions}"))
        }),
    }
}
