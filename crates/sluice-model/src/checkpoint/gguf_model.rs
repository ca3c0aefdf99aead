//! From GGUF's names, metadata and row order to ours. Knows the llama, qwen2 and qwen3 families.
//!
//! The trap: converters permute the rows of q and k of a `llama` so that rotary pairs lie side by side
//! (interleaved); `qwen2` and `qwen3` keep Hugging Face's half-split order. In memory everything is half-split.

use std::collections::BTreeMap;
use std::path::Path;

use sluice_spec::{Architecture, ConfigError, GgufTokenizer, ModelConfig, RopeScaling, TextConfig, TokenizerSource, tensor_names};
use sluice_tensor::{DType, Tensor};

use super::file::SizedFile;
use super::gguf::{Array, Gguf, Metadata, Value};
use super::stored::StoredTensor;
use super::{Checkpoint, CheckpointError, check_tensors};

/// Frequency divisors of llama 3's rotary scaling, one for each pair.
const ROPE_FREQS: &str = "rope_freqs.weight";
/// Type of a token that is never part of a text (`tokenizer.ggml.token_type`).
const CONTROL_TOKEN: i32 = 3;
/// Control tokens that end a turn in every chat format of these families. A GGUF file names one EOS,
/// but a base model and its chat version use different ones, so readers of GGUF look them up by name.
const END_OF_TURN: [&str; 3] = ["<|im_end|>", "<|endoftext|>", "<|eot_id|>"];

/// Load a GGUF file as a checkpoint.
pub(super) fn load(file: SizedFile) -> Result<Checkpoint, CheckpointError> {
    let mut gguf = Gguf::parse(file)?;
    let path = gguf.file.path().to_path_buf();
    let rope_freqs = gguf.tensors.remove(ROPE_FREQS);
    let stored = rename(&path, std::mem::take(&mut gguf.tensors))?;
    let mut config = parse_config(&gguf.metadata, &stored).map_err(|e| CheckpointError::config(&path, e))?;
    if let Some(freqs) = rope_freqs {
        let freqs = freqs.read(&gguf.file)?.to_dtype(DType::F32);
        let scaling = scaling_of_factors(freqs.f32(), &config, gguf.metadata.u64("llama.rope.scaling.original_context_length"));
        config.rope_scaling = scaling.map_err(|e| CheckpointError::config(&path, e))?;
    }
    check_tensors(&path, &config, stored.iter().map(|(name, t)| (name.as_str(), t.shape.as_slice())))?;

    let mut tensors = BTreeMap::new();
    for (name, place) in &stored {
        let mut tensor = place.read(&gguf.file)?;
        if config.architecture == Architecture::Llama {
            if name.ends_with("self_attn.q_proj.weight") {
                tensor = half_split_rows(&tensor, config.n_heads);
            } else if name.ends_with("self_attn.k_proj.weight") {
                tensor = half_split_rows(&tensor, config.n_kv_heads);
            }
        }
        tensors.insert(name.clone(), tensor);
    }
    let (tokenizer, text) = parse_tokenizer(&mut gguf.metadata, config.vocab_size).map_err(|e| CheckpointError::config(&path, e))?;
    Ok(Checkpoint { path, config, tensors, tokenizer, text, gates: None })
}

/// Tensors under Hugging Face names.
fn rename(path: &Path, stored: BTreeMap<String, StoredTensor>) -> Result<BTreeMap<String, StoredTensor>, CheckpointError> {
    let mut renamed = BTreeMap::new();
    for (name, tensor) in stored {
        let Some(new) = hf_name(&name) else {
            let found = format!("tensor `{name}` of shape {:?}", tensor.shape);
            return Err(CheckpointError::unexpected(path, found, "only tensors of a dense llama, qwen2 or qwen3 decoder"));
        };
        renamed.insert(new, tensor);
    }
    Ok(renamed)
}

fn hf_name(gguf_name: &str) -> Option<String> {
    match gguf_name {
        "token_embd.weight" => return Some(tensor_names::EMBED.into()),
        "output_norm.weight" => return Some(tensor_names::FINAL_NORM.into()),
        "output.weight" => return Some(tensor_names::LM_HEAD.into()),
        _ => {}
    }
    let (layer, part) = gguf_name.strip_prefix("blk.")?.split_once('.')?;
    // One spelling of each number, or two names could mean the same tensor.
    let layer: usize = layer.parse().ok().filter(|n: &usize| n.to_string() == layer)?;
    let part = match part {
        "attn_norm.weight" => "input_layernorm.weight",
        "attn_q.weight" => "self_attn.q_proj.weight",
        "attn_q.bias" => "self_attn.q_proj.bias",
        "attn_q_norm.weight" => "self_attn.q_norm.weight",
        "attn_k.weight" => "self_attn.k_proj.weight",
        "attn_k.bias" => "self_attn.k_proj.bias",
        "attn_k_norm.weight" => "self_attn.k_norm.weight",
        "attn_v.weight" => "self_attn.v_proj.weight",
        "attn_v.bias" => "self_attn.v_proj.bias",
        "attn_output.weight" => "self_attn.o_proj.weight",
        "ffn_norm.weight" => "post_attention_layernorm.weight",
        "ffn_gate.weight" => "mlp.gate_proj.weight",
        "ffn_up.weight" => "mlp.up_proj.weight",
        "ffn_down.weight" => "mlp.down_proj.weight",
        _ => return None,
    };
    Some(tensor_names::of_layer(layer, part))
}

/// Rows of interleaved rotary pairs `(head, pair, side)` back to `(head, side, pair)`.
fn half_split_rows(w: &Tensor, n_heads: usize) -> Tensor {
    let [rows, m] = w.dims();
    let half = rows / n_heads / 2;
    let source = |row: usize| {
        let (head, side, pair) = (row / (2 * half), row / half % 2, row % half);
        head * 2 * half + pair * 2 + side
    };
    match w.dtype() {
        DType::F32 => Tensor::from_vec(gather_rows(w.f32(), rows, m, source), [rows, m]),
        DType::Bf16 => Tensor::from_bf16_vec(gather_rows(w.bf16(), rows, m, source), [rows, m]),
    }
}

fn gather_rows<T: Copy>(data: &[T], rows: usize, m: usize, source: impl Fn(usize) -> usize) -> Vec<T> {
    let mut out = Vec::with_capacity(rows * m);
    for row in 0..rows {
        let from = source(row) * m;
        out.extend_from_slice(&data[from..from + m]);
    }
    out
}

/// Shape of the model from `<architecture>.*` metadata. Settings that would change the numbers and that
/// we do not compute are errors.
fn parse_config(metadata: &Metadata, stored: &BTreeMap<String, StoredTensor>) -> Result<ModelConfig, ConfigError> {
    if let Some(n) = metadata.u64("split.count")
        && n > 1
    {
        return Err(ConfigError::new(format!("this is one of {n} parts of a split model; join them first (llama-gguf-split --merge)")));
    }
    let architecture = match metadata.get("general.architecture") {
        Some(Value::Text(name)) => Architecture::parse(name)?,
        other => return Err(ConfigError::new(format!("`general.architecture` is {}; expected a name", shown(other)))),
    };
    let keys = Keys { metadata, prefix: architecture.name() };
    for key in ["expert_count", "attention.sliding_window", "attention.max_alibi_bias", "attention.clamp_kqv"] {
        keys.refuse_unless(key, |v| v.as_f64() == Some(0.0), "absent or 0")?;
    }
    for key in ["logit_scale", "residual_scale", "embedding_scale"] {
        keys.refuse_unless(key, |v| matches!(v.as_f64(), Some(0.0 | 1.0)), "absent or 1")?;
    }
    keys.refuse_unless("attention.scale", |v| v.as_f64() == Some(0.0), "absent or 0")?;
    keys.refuse_unless("attention.causal", |v| *v == Value::Bool(true), "absent or true")?;

    let d_model = keys.size("embedding_length")?;
    let n_heads = keys.uniform_size("attention.head_count")?;
    if n_heads == 0 {
        return Err(ConfigError::new("0 attention heads; expected at least 1"));
    }
    let n_kv_heads = if keys.has("attention.head_count_kv") { keys.uniform_size("attention.head_count_kv")? } else { n_heads };
    let head_dim = if keys.has("attention.key_length") { keys.size("attention.key_length")? } else { d_model / n_heads };
    for key in ["attention.value_length", "rope.dimension_count"] {
        if keys.has(key) && keys.size(key)? != head_dim {
            let found = keys.size(key)?;
            return Err(ConfigError::new(format!("`{}.{key}` is {found}; expected the head width {head_dim}", keys.prefix)));
        }
    }
    let embed = stored.get(tensor_names::EMBED).ok_or_else(|| ConfigError::new("no tensor `token_embd.weight`; expected the embedding"))?;
    let config = ModelConfig {
        architecture,
        n_layers: keys.size("block_count")?,
        d_model,
        d_ff: keys.uniform_size("feed_forward_length")?,
        n_heads,
        n_kv_heads,
        head_dim,
        vocab_size: embed.shape[0],
        max_seq_len: keys.size("context_length")?,
        norm_eps: keys.number("attention.layer_norm_rms_epsilon")?,
        rope_theta: if keys.has("rope.freq_base") { keys.number("rope.freq_base")? } else { 10_000.0 },
        rope_scaling: parse_rope_scaling(&keys)?,
        tie_embeddings: !stored.contains_key(tensor_names::LM_HEAD),
        qkv_bias: architecture == Architecture::Qwen2,
        qk_norm: architecture == Architecture::Qwen3,
    };
    config.validate()?;
    Ok(config)
}

fn parse_rope_scaling(keys: &Keys<'_>) -> Result<Option<RopeScaling>, ConfigError> {
    // Files of 2023 name the factor `rope.scale_linear` and no type.
    let factor = match ["rope.scaling.factor", "rope.scale_linear"].iter().find(|k| keys.has(k)) {
        Some(key) => keys.number(key)?,
        None => 1.0,
    };
    let linear = match keys.get("rope.scaling.type") {
        None => true,
        Some(Value::Text(kind)) if kind == "linear" => true,
        Some(Value::Text(kind)) if kind == "none" => false,
        Some(other) => {
            let found = other.shown();
            return Err(ConfigError::new(format!("rope scaling {found} is not supported; expected none, linear or llama 3's factors")));
        }
    };
    if !linear || factor == 1.0 || factor == 0.0 {
        return Ok(None);
    }
    if !(factor > 0.0 && factor.is_finite()) {
        return Err(ConfigError::new(format!("rope scaling factor is {factor}; expected a positive number")));
    }
    Ok(Some(RopeScaling::Linear { factor }))
}

/// The llama 3 scaling whose divisors are `factors`. The file holds only the divisors, so the
/// parameters are looked up among those that were ever published and accepted when they reproduce them.
fn scaling_of_factors(factors: &[f32], config: &ModelConfig, original: Option<u64>) -> Result<Option<RopeScaling>, ConfigError> {
    let n = config.head_dim / 2;
    if factors.len() != n {
        return Err(ConfigError::new(format!("`{ROPE_FREQS}` has {} elements; expected half the head width, {n}", factors.len())));
    }
    if config.rope_scaling.is_some() {
        return Err(ConfigError::new(format!("both `{ROPE_FREQS}` and a linear rope scaling; expected one of them")));
    }
    if factors.iter().all(|&f| f == 1.0) {
        return Ok(None);
    }
    let factor = factors[n - 1];
    for original_max_seq_len in [original.unwrap_or(8192) as usize, 8192] {
        let (low_freq_factor, high_freq_factor) = (1.0, 4.0);
        let scaling = RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_seq_len };
        let (low, high, length) = (low_freq_factor as f64, high_freq_factor as f64, original_max_seq_len as f64);
        let exact = factors.iter().enumerate().all(|(i, &found)| {
            let frequency = (config.rope_theta as f64).powf(-2.0 * i as f64 / config.head_dim as f64);
            let turns = length * frequency / std::f64::consts::TAU;
            let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            let want = 1.0 / ((1.0 - keep) / factor as f64 + keep);
            (found as f64 - want).abs() <= 1e-4 * want
        });
        if exact {
            return Ok(Some(scaling));
        }
    }
    Err(ConfigError::new(format!(
        "`{ROPE_FREQS}` holds divisors up to {factor} that are not llama 3's (low_freq_factor 1, high_freq_factor 4); convert from the Hugging Face folder instead"
    )))
}

/// `tokenizer.*` metadata.
fn parse_tokenizer(metadata: &mut Metadata, vocab_size: usize) -> Result<(TokenizerSource, TextConfig), ConfigError> {
    let mut text = TextConfig::default();
    let id = |metadata: &Metadata, key: &str| match metadata.get(key) {
        None => Ok(None),
        Some(v) => match v.as_u64() {
            Some(id) if id < vocab_size as u64 => Ok(Some(id as u32)),
            _ => Err(ConfigError::new(format!("`{key}` is {}; expected a token id below {vocab_size}", v.shown()))),
        },
    };
    text.bos = id(metadata, "tokenizer.ggml.bos_token_id")?;
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        text.eos.extend(id(metadata, key)?);
    }
    text.chat_template = take_text(metadata, "tokenizer.chat_template")?;
    let Some(model) = take_text(metadata, "tokenizer.ggml.model")? else {
        return Ok((TokenizerSource::Missing, text));
    };
    let pre = take_text(metadata, "tokenizer.ggml.pre")?.unwrap_or_default();
    let tokens = take_texts(metadata, "tokenizer.ggml.tokens")?;
    if tokens.len() > vocab_size {
        return Err(ConfigError::new(format!("{} tokens for an embedding of {vocab_size} rows; expected no more than rows", tokens.len())));
    }
    let merges = take_texts(metadata, "tokenizer.ggml.merges")?;
    let token_types = match metadata.take("tokenizer.ggml.token_type") {
        None => Vec::new(),
        Some(Value::Array(Array::I32(types))) if types.len() == tokens.len() => types,
        Some(Value::Array(Array::U32(types))) if types.len() == tokens.len() => types.into_iter().map(|t| t as i32).collect(),
        Some(other) => {
            let found = other.shown();
            return Err(ConfigError::new(format!("`tokenizer.ggml.token_type` is {found}; expected {} integers", tokens.len())));
        }
    };
    let add_bos = match metadata.get("tokenizer.ggml.add_bos_token") {
        Some(Value::Bool(add)) => *add,
        // What llama.cpp assumes for files that do not say.
        None => model == "llama" || pre == "llama-bpe",
        Some(other) => return Err(ConfigError::new(format!("`tokenizer.ggml.add_bos_token` is {}; expected a boolean", other.shown()))),
    };
    for (i, token) in tokens.iter().enumerate() {
        let i = i as u32;
        if END_OF_TURN.contains(&token.as_str()) && token_types.get(i as usize) == Some(&CONTROL_TOKEN) && !text.eos.contains(&i) {
            text.eos.push(i);
        }
    }
    text.eos.dedup();
    Ok((TokenizerSource::Gguf(GgufTokenizer { model, pre, tokens, merges, token_types, add_bos }), text))
}

fn take_text(metadata: &mut Metadata, key: &str) -> Result<Option<String>, ConfigError> {
    match metadata.take(key) {
        None => Ok(None),
        Some(Value::Text(text)) => Ok(Some(text)),
        Some(other) => Err(ConfigError::new(format!("`{key}` is {}; expected text", other.shown()))),
    }
}

fn take_texts(metadata: &mut Metadata, key: &str) -> Result<Vec<String>, ConfigError> {
    match metadata.take(key) {
        None => Ok(Vec::new()),
        Some(Value::Array(Array::Text(texts))) => Ok(texts),
        Some(other) => Err(ConfigError::new(format!("`{key}` is {}; expected an array of texts", other.shown()))),
    }
}

/// Metadata under the architecture's prefix.
struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: &'static str,
}

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(&format!("{}.{key}", self.prefix))
    }

    fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    fn wrong(&self, key: &str, expected: &str) -> ConfigError {
        ConfigError::new(format!("`{}.{key}` is {}; expected {expected}", self.prefix, shown(self.get(key))))
    }

    fn size(&self, key: &str) -> Result<usize, ConfigError> {
        self.get(key).and_then(Value::as_u64).and_then(|v| v.try_into().ok()).ok_or_else(|| self.wrong(key, "a whole number"))
    }

    /// A size that some converters write once for each layer; one decoder layer shape serves all.
    fn uniform_size(&self, key: &str) -> Result<usize, ConfigError> {
        let Some(Value::Array(array)) = self.get(key) else {
            return self.size(key);
        };
        let sizes = array.as_u64s().unwrap_or_default();
        match sizes.first() {
            Some(&first) if sizes.iter().all(|&s| s == first) => first.try_into().map_err(|_| self.wrong(key, "a whole number")),
            _ => Err(self.wrong(key, "one whole number for all layers")),
        }
    }

    fn number(&self, key: &str) -> Result<f32, ConfigError> {
        self.get(key).and_then(Value::as_f64).map(|v| v as f32).ok_or_else(|| self.wrong(key, "a number"))
    }

    fn refuse_unless(&self, key: &str, harmless: impl Fn(&Value) -> bool, expected: &str) -> Result<(), ConfigError> {
        if self.get(key).is_none_or(harmless) { Ok(()) } else { Err(self.wrong(key, &format!("{expected}; it would change the results"))) }
    }
}

fn shown(value: Option<&Value>) -> String {
    value.map_or("missing".into(), Value::shown)
}
