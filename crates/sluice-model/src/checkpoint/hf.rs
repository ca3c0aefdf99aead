//! Hugging Face folders: `config.json`, weights in one `model.safetensors` or in shards with an index,
//! `tokenizer.json`, generation and chat settings, and our `gates.safetensors`. Knows nothing about GGUF.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use sluice_spec::{ConfigError, ModelConfig, TextConfig, TokenizerSource, tensor_names};

use super::file::read_text;
use super::gates::{GATES_FILE, load_gates};
use super::safetensors::Safetensors;
use super::{Checkpoint, CheckpointError, check_tensors};

pub(super) const CONFIG: &str = "config.json";
pub(super) const WEIGHTS: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(super) const GENERATION_CONFIG: &str = "generation_config.json";
pub(super) const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// Buffers that old checkpoints carry; we compute them from the config.
const COMPUTED: [&str; 2] = ["self_attn.rotary_emb.inv_freq", "self_attn.masked_bias"];

/// Load a folder as a checkpoint.
pub(super) fn load(folder: &Path) -> Result<Checkpoint, CheckpointError> {
    let config_path = folder.join(CONFIG);
    if !config_path.exists() {
        let expected =
            format!("a Hugging Face folder with {CONFIG} (an export that was interrupted has none), or the path of a .gguf file");
        return Err(CheckpointError::unexpected(folder, format!("no {CONFIG}"), expected));
    }
    let config_text = read_text(&config_path)?;
    let config = ModelConfig::from_hf_json(&config_text).map_err(|e| CheckpointError::config(&config_path, e))?;
    let weights = Weights::open(folder)?;
    let names = wanted_names(folder, &config, &weights)?;

    let shapes = names.iter().map(|name| (name.as_str(), weights.file_of(name).tensors[name].shape.as_slice()));
    check_tensors(folder, &config, shapes)?;
    let mut tensors = BTreeMap::new();
    for name in names {
        let tensor = weights.file_of(&name).read(&name)?;
        tensors.insert(name, tensor);
    }
    let tokenizer_path = folder.join(TOKENIZER);
    let tokenizer = if tokenizer_path.exists() { TokenizerSource::Json(tokenizer_path) } else { TokenizerSource::Missing };
    let text = read_text_config(folder, &config_path, &config_text, config.vocab_size)?;
    let gates = if folder.join(GATES_FILE).exists() { Some(load_gates(folder, &config)?) } else { None };
    Ok(Checkpoint { path: folder.to_path_buf(), config, tensors, tokenizer, text, gates })
}

/// Names to load: all that the files hold, less buffers and a second copy of tied embeddings.
fn wanted_names(folder: &Path, config: &ModelConfig, weights: &Weights) -> Result<Vec<String>, CheckpointError> {
    let mut names = Vec::new();
    for name in weights.place.keys() {
        if COMPUTED.iter().any(|buffer| name.ends_with(buffer)) {
            continue;
        }
        if name == tensor_names::LM_HEAD && config.tie_embeddings {
            let same = match weights.place.get(tensor_names::EMBED) {
                None => false,
                Some(_) => {
                    let [head, embed] = [tensor_names::LM_HEAD, tensor_names::EMBED].map(|n| weights.file_of(n).read(n));
                    let [head, embed] = [head?, embed?].map(|t| t.to_dtype(sluice_tensor::DType::F32));
                    head.shape() == embed.shape() && head.f32() == embed.f32()
                }
            };
            if !same {
                let found = format!("`{name}` other than `{}` while {CONFIG} ties them", tensor_names::EMBED);
                return Err(CheckpointError::unexpected(folder, found, "equal tensors, or `tie_word_embeddings` false"));
            }
            continue;
        }
        names.push(name.clone());
    }
    Ok(names)
}

/// The weight files of a folder and which of them holds each tensor.
pub(super) struct Weights {
    files: Vec<Safetensors>,
    pub(super) place: BTreeMap<String, usize>,
}

impl Weights {
    pub(super) fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let (whole, index) = (folder.join(WEIGHTS), folder.join(INDEX));
        if whole.exists() {
            let file = Safetensors::open(&whole)?;
            let place = file.tensors.keys().map(|name| (name.clone(), 0)).collect();
            return Ok(Self { files: vec![file], place });
        }
        if !index.exists() {
            let expected = "one of them; weights in other formats (.bin, .pth) must be converted to safetensors first";
            return Err(CheckpointError::unexpected(folder, format!("neither {WEIGHTS} nor {INDEX}"), expected));
        }
        Self::open_shards(folder, &index)
    }

    fn open_shards(folder: &Path, index: &Path) -> Result<Self, CheckpointError> {
        let wrong = |found: String, expected: &str| CheckpointError::unexpected(index, found, expected);
        let root: Value = serde_json::from_str(&read_text(index)?).map_err(|e| wrong(format!("JSON that does not parse: {e}"), "JSON"))?;
        let map = root.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| wrong("no `weight_map`".into(), "an object of tensor names and file names"))?;
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        let mut listed: BTreeMap<&str, usize> = BTreeMap::new();
        for (tensor, shard) in map {
            // A plain name: an index must not reach outside its folder.
            let plain = shard.as_str().filter(|s| Path::new(s).file_name().is_some_and(|n| n == *s) && s.ends_with(".safetensors"));
            let Some(shard) = plain else {
                return Err(wrong(format!("the shard {shard} for `{tensor}`"), "the name of a .safetensors file in the same folder"));
            };
            let next = numbers.len();
            listed.insert(tensor, *numbers.entry(shard).or_insert(next));
        }
        let mut shards: Vec<(&str, usize)> = numbers.into_iter().collect();
        shards.sort_by_key(|s| s.1);
        let files: Vec<Safetensors> = shards.iter().map(|(shard, _)| Safetensors::open(&folder.join(shard))).collect::<Result<_, _>>()?;

        let mut place = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for name in file.tensors.keys() {
                if listed.get(name.as_str()) != Some(&number) {
                    let expected = format!("only tensors that {INDEX} places there");
                    return Err(CheckpointError::unexpected(file.file.path(), format!("tensor `{name}`"), expected));
                }
                place.insert(name.clone(), number);
            }
        }
        if let Some((name, number)) = listed.iter().find(|(name, _)| !place.contains_key(**name)) {
            return Err(CheckpointError::unexpected(
                files[*number].file.path(),
                format!("no tensor `{name}`"),
                format!("it here, says {INDEX}"),
            ));
        }
        Ok(Self { files, place })
    }

    pub(super) fn file_of(&self, name: &str) -> &Safetensors {
        &self.files[self.place[name]]
    }
}

/// Special tokens and chat template. `generation_config.json` wins over `config.json`, as it does in transformers.
fn read_text_config(folder: &Path, config_path: &Path, config_text: &str, vocab_size: usize) -> Result<TextConfig, CheckpointError> {
    let config = parse_json(config_path, config_text)?;
    let mut text = TextConfig { bos: ids(config_path, &config, "bos_token_id", vocab_size)?.first().copied(), ..TextConfig::default() };
    text.eos = ids(config_path, &config, "eos_token_id", vocab_size)?;
    let path = folder.join(GENERATION_CONFIG);
    if path.exists() {
        let generation = parse_json(&path, &read_text(&path)?)?;
        if let Some(bos) = ids(&path, &generation, "bos_token_id", vocab_size)?.first() {
            text.bos = Some(*bos);
        }
        let eos = ids(&path, &generation, "eos_token_id", vocab_size)?;
        if !eos.is_empty() {
            text.eos = eos;
        }
    }
    let (template, path) = (folder.join(CHAT_TEMPLATE), folder.join(TOKENIZER_CONFIG));
    if template.exists() {
        text.chat_template = Some(read_text(&template)?);
    } else if path.exists() {
        text.chat_template = match parse_json(&path, &read_text(&path)?)?.get("chat_template") {
            None | Some(Value::Null) => None,
            Some(Value::String(template)) => Some(template.clone()),
            // Several named templates; `default` is the one for plain chat.
            Some(Value::Array(named)) => {
                let default = named.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
                default.and_then(|t| t.get("template")).and_then(Value::as_str).map(str::to_string)
            }
            Some(_) => {
                return Err(CheckpointError::unexpected(&path, "a `chat_template` of another kind", "text or a list of named templates"));
            }
        };
    }
    Ok(text)
}

pub(super) fn parse_json(path: &Path, text: &str) -> Result<Value, CheckpointError> {
    serde_json::from_str(text).map_err(|e| CheckpointError::config(path, ConfigError::new(format!("not valid JSON: {e}"))))
}

/// Token ids under a key that holds one, a list or nothing.
fn ids(path: &Path, root: &Value, key: &str, vocab_size: usize) -> Result<Vec<u32>, CheckpointError> {
    let list = match root.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list.clone(),
        Some(one) => vec![one.clone()],
    };
    let id = |v: &Value| v.as_u64().filter(|&id| id < vocab_size as u64).map(|id| id as u32);
    let wrong = |v: &Value| CheckpointError::unexpected(path, format!("{v} in `{key}`"), format!("token ids below {vocab_size}"));
    list.iter().map(|v| id(v).ok_or_else(|| wrong(v))).collect()
}
