//! Writes a checkpoint as a Hugging Face folder that transformers and [`super::load`] read. Knows
//! nothing about where the weights come from.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};
use sluice_spec::{ModelConfig, TextConfig};
use sluice_tensor::{DType, Tensor};

use super::file::write_atomically;
use super::gates::{GATES_FILE, Gates, save_gates};
use super::hf::{CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS};
use super::{CheckpointError, check_tensors, safetensors};

/// Write `config.json`, `model.safetensors` in `dtype`, generation and chat settings, the tokenizer if
/// its JSON is given, and `gates.safetensors` in f32.
///
/// Every file is written aside and renamed; `config.json` goes first and comes back last, so that an
/// interrupted export does not load. An old gate file in the folder is removed: it belonged to other weights.
pub fn export_hf(
    dir: &Path,
    config: &ModelConfig,
    tensors: &BTreeMap<String, Tensor>,
    text: &TextConfig,
    tokenizer_json: Option<&str>,
    gates: Option<&Gates>,
    dtype: DType,
) -> Result<(), CheckpointError> {
    config.validate().map_err(|e| CheckpointError::config(dir, e))?;
    check_tensors(dir, config, tensors.iter().map(|(name, t)| (name.as_str(), t.shape())))?;
    fs::create_dir_all(dir).map_err(|e| CheckpointError::io("create", dir, e))?;
    for stale in [CONFIG, GATES_FILE, CHAT_TEMPLATE] {
        remove_if_present(&dir.join(stale))?;
    }

    let weights: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]); // transformers refuses files without it.
    safetensors::write(&dir.join(WEIGHTS), &metadata, &weights, dtype)?;
    if let Some(gates) = gates {
        save_gates(&dir.join(GATES_FILE), gates, config)?;
    }
    if let Some(tokenizer) = tokenizer_json {
        write_atomically(&dir.join(TOKENIZER), |out| out.write_all(tokenizer.as_bytes()))?;
    }
    let eos = match text.eos.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    let mut tokenizer_config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_seq_len});
    if let Some(template) = &text.chat_template {
        tokenizer_config["chat_template"] = json!(template);
    }
    write_json(&dir.join(TOKENIZER_CONFIG), &tokenizer_config)?;
    write_json(&dir.join(GENERATION_CONFIG), &json!({"bos_token_id": text.bos, "eos_token_id": eos}))?;
    let mut root = config.to_hf_json(text.bos, None);
    root["eos_token_id"] = eos;
    root["torch_dtype"] = json!(match dtype {
        DType::F32 => "float32",
        DType::Bf16 => "bfloat16",
    });
    write_json(&dir.join(CONFIG), &root)
}

fn write_json(path: &Path, value: &Value) -> Result<(), CheckpointError> {
    write_atomically(path, |out| writeln!(out, "{value:#}"))
}

fn remove_if_present(path: &Path) -> Result<(), CheckpointError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(CheckpointError::io("remove", path, e)),
        _ => Ok(()),
    }
}
