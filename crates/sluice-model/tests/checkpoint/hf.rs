//! Hugging Face folders: export and import, shards, other people's files.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use half::f16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use sluice_model::checkpoint::{self, GATES_FILE, Gates};
use sluice_spec::{Architecture, ModelConfig, RoutingConfig, TextConfig, TokenizerSource, tensor_names};
use sluice_tensor::{DType, Tensor};

use super::gates::random_gates;
use super::support::*;

fn export(folder: &Path, config: &ModelConfig, tensors: &Tensors) {
    checkpoint::export_hf(folder, config, tensors, &text_config(), None, None, DType::F32).unwrap();
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut root = fs::read_to_string(path).map_or(json!({}), |text| serde_json::from_str(&text).unwrap());
    edit(&mut root);
    fs::write(path, root.to_string()).unwrap();
}

/// Write tensors with the `safetensors` crate, as other programs do.
fn write_with_the_crate(path: &Path, tensors: &[(&str, &Tensor)], dtype: Dtype) {
    let encode = |x: &f32| if dtype == Dtype::F16 { f16::from_f32(*x).to_le_bytes().to_vec() } else { x.to_le_bytes().to_vec() };
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, t)| t.f32().iter().flat_map(encode).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, t), b)| (*name, TensorView::new(dtype, t.shape().to_vec(), b).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn export_survives_a_round_trip_in_both_formats() {
    let config = tiny_config(Architecture::Qwen3);
    let tensors = random_tensors(&config, 1);
    let gates = random_gates(&config, RoutingConfig::default(), 2);
    for dtype in [DType::F32, DType::Bf16] {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("new/folder");
        checkpoint::export_hf(&dir, &config, &tensors, &text_config(), Some("{\"model\": 1}"), Some(&gates), dtype).unwrap();
        let loaded = checkpoint::load(&dir).unwrap();
        assert_eq!((&loaded.config, &loaded.text, &loaded.path), (&config, &text_config(), &dir));
        assert!(loaded.tensors.values().all(|t| t.dtype() == dtype));
        assert_same_tensors(&loaded.tensors, &tensors);
        assert_eq!(loaded.tokenizer, TokenizerSource::Json(dir.join("tokenizer.json")));
        assert_eq!(fs::read_to_string(dir.join("tokenizer.json")).unwrap(), "{\"model\": 1}");
        assert_eq!(loaded.gates.unwrap().note, gates.note);
        let left: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|n| !n.to_string_lossy().ends_with("partial")), "{left:?}");
    }
}

#[test]
fn bf16_weights_can_be_exported_as_f32_and_rounded_to_bf16() {
    let config = tiny_config(Architecture::Llama);
    let tensors: Tensors = random_tensors(&config, 3).into_iter().map(|(n, t)| (n, t.to_dtype(DType::Bf16))).collect();
    let folder = tempfile::tempdir().unwrap();
    export(folder.path(), &config, &tensors);
    assert_same_tensors(&checkpoint::load(folder.path()).unwrap().tensors, &tensors);

    let mut odd = tensors.clone();
    odd.insert(tensor_names::FINAL_NORM.into(), Tensor::full(1.0 / 3.0, [32]));
    checkpoint::export_hf(folder.path(), &config, &odd, &TextConfig::default(), None, None, DType::Bf16).unwrap();
    let loaded = checkpoint::load(folder.path()).unwrap();
    assert_same_tensors(&loaded.tensors, &odd.iter().map(|(n, t)| (n.clone(), t.to_dtype(DType::Bf16))).collect());
    assert_eq!(loaded.text, TextConfig::default());
}

#[test]
fn our_files_and_those_of_the_safetensors_crate_are_the_same_format() {
    let config = tiny_config(Architecture::Qwen2);
    let tensors = random_tensors(&config, 4);
    let folder = tempfile::tempdir().unwrap();
    export(folder.path(), &config, &tensors);
    let weights = folder.path().join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.len(), tensors.len());
    for (name, tensor) in &tensors {
        let view = theirs.tensor(name).unwrap();
        assert_eq!((view.dtype(), view.shape()), (Dtype::F32, tensor.shape()));
        assert!(view.data().iter().eq(tensor.f32().iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>().iter()));
    }
    let all: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    for dtype in [Dtype::F32, Dtype::F16] {
        write_with_the_crate(&weights, &all, dtype);
        assert_same_tensors(&checkpoint::load(folder.path()).unwrap().tensors, &tensors);
    }
}

/// A folder with the weights in two shards and an index.
fn sharded(folder: &Path, config: &ModelConfig, tensors: &Tensors) {
    export(folder, config, tensors);
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    let mut map = HashMap::new();
    for (number, odd) in [false, true].into_iter().enumerate() {
        let shard = format!("model-0000{}-of-00002.safetensors", number + 1);
        let part: Vec<_> = tensors.iter().enumerate().filter(|(i, _)| (i % 2 == 1) == odd).map(|(_, (n, t))| (n.as_str(), t)).collect();
        write_with_the_crate(&folder.join(&shard), &part, Dtype::F32);
        map.extend(part.iter().map(|(n, _)| (n.to_string(), shard.clone())));
    }
    fs::write(folder.join("model.safetensors.index.json"), json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string()).unwrap();
}

#[test]
fn shards_load_like_one_file_and_disagreements_are_refused() {
    let config = tiny_config(Architecture::Llama);
    let tensors = random_tensors(&config, 5);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    sharded(dir, &config, &tensors);
    assert_same_tensors(&checkpoint::load(dir).unwrap().tensors, &tensors);

    let index = dir.join("model.safetensors.index.json");
    let second = dir.join("model-00002-of-00002.safetensors");
    let edited = |edit: &dyn Fn(&mut Value)| {
        sharded(dir, &config, &tensors);
        edit_json(&index, |root| edit(&mut root["weight_map"]));
        checkpoint::load(dir).err().expect("the folder must not load").to_string()
    };
    let norm = tensor_names::FINAL_NORM;
    assert_mentions(&edited(&|map| map[norm] = json!("../model-00001-of-00002.safetensors")), &["../model-00001", "same folder"]);
    assert_mentions(&edited(&|map| map[norm] = json!("model-00003-of-00002.safetensors")), &["model-00003", "open"]);
    assert_mentions(&edited(&|map| map[norm] = json!(7)), &["7", norm]);
    assert_mentions(&edited(&|map| map["extra"] = json!("model-00001-of-00002.safetensors")), &["no tensor `extra`"]);
    assert_mentions(&edited(&|map| *map = json!(null)), &["weight_map"]);
    assert_mentions(&edited(&|map| drop(map.as_object_mut().unwrap().remove(norm))), &[norm, "index"]);
    sharded(dir, &config, &tensors);
    fs::copy(dir.join("model-00001-of-00002.safetensors"), &second).unwrap();
    assert_mentions(&checkpoint::load(dir).err().unwrap().to_string(), &["model-00002"]);
    fs::remove_file(&second).unwrap();
    assert_mentions(&checkpoint::load(dir).err().unwrap().to_string(), &["model-00002", "open"]);
}

#[test]
fn text_settings_come_from_the_usual_places() {
    let config = tiny_config(Architecture::Llama);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    export(dir, &config, &random_tensors(&config, 6));
    let text = || checkpoint::load(dir).unwrap().text;
    assert_eq!(text(), text_config());

    edit_json(&dir.join("generation_config.json"), |root| *root = json!({"eos_token_id": [5, 6]}));
    assert_eq!((text().bos, text().eos), (Some(1), vec![5, 6]));
    fs::remove_file(dir.join("generation_config.json")).unwrap();
    edit_json(&dir.join("config.json"), |root| root["eos_token_id"] = json!(9));
    assert_eq!(text().eos, [9]);
    let named = json!([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]);
    edit_json(&dir.join("tokenizer_config.json"), |root| root["chat_template"] = named);
    assert_eq!(text().chat_template.as_deref(), Some("D"));
    fs::write(dir.join("chat_template.jinja"), "J").unwrap();
    assert_eq!(text().chat_template.as_deref(), Some("J"));

    edit_json(&dir.join("config.json"), |root| root["eos_token_id"] = json!([3, 40]));
    assert_mentions(&load_error(dir), &["40", "eos_token_id", "config.json"]);
}

#[test]
fn a_second_copy_of_tied_embeddings_must_be_equal() {
    let config = tiny_config(Architecture::Llama);
    let tensors = random_tensors(&config, 7);
    let folder = tempfile::tempdir().unwrap();
    export(folder.path(), &config, &tensors);
    let weights = folder.path().join("model.safetensors");
    let inv_freq = Tensor::zeros([4]);
    let with_head = |head: &Tensor| {
        let mut all: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
        all.push((tensor_names::LM_HEAD, head));
        all.push(("model.layers.0.self_attn.rotary_emb.inv_freq", &inv_freq));
        write_with_the_crate(&weights, &all, Dtype::F32);
    };
    with_head(&tensors[tensor_names::EMBED]);
    assert_same_tensors(&checkpoint::load(folder.path()).unwrap().tensors, &tensors);
    let mut other = tensors[tensor_names::EMBED].clone();
    other.f32_mut()[17] += 1.0;
    with_head(&other);
    assert_mentions(&load_error(folder.path()), &["lm_head.weight", "tie"]);
}

#[test]
fn folders_that_are_not_checkpoints_say_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    assert_mentions(&load_error(&dir.join("nowhere")), &["cannot open"]);
    assert_mentions(&load_error(dir), &["no config.json", ".gguf"]);
    let config = tiny_config(Architecture::Llama);
    let tensors = random_tensors(&config, 8);
    export(dir, &config, &tensors);
    edit_json(&dir.join("config.json"), |root| root["num_hidden_layers"] = json!(3));
    assert_mentions(&load_error(dir), &["20 of 29 tensors", "model.layers.2.", "9 missing"]);
    edit_json(&dir.join("config.json"), |root| root["num_hidden_layers"] = json!(1));
    assert_mentions(&load_error(dir), &["model.layers.1.", "1 layers"]);
    edit_json(&dir.join("config.json"), |root| root["model_type"] = json!("mamba"));
    assert_mentions(&load_error(dir), &["config.json", "mamba"]);
    export(dir, &config, &tensors);
    assert_mentions(&load_error(&dir.join("model.safetensors")), &["folder"]);
    assert_mentions(&load_error(&dir.join("config.json")), &["begins with", "GGUF"]);
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    assert_mentions(&load_error(dir), &["model.safetensors", "model.safetensors.index.json"]);
    let doubles = [0u8; 256];
    let views = [(tensor_names::FINAL_NORM, TensorView::new(Dtype::F64, vec![32], &doubles).unwrap())];
    fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    assert_mentions(&load_error(dir), &["1 of 20 tensors"]);
}

#[test]
fn export_replaces_an_older_one_and_an_interrupted_one_does_not_load() {
    let config = tiny_config(Architecture::Llama);
    let tensors = random_tensors(&config, 9);
    let gates: Gates = random_gates(&config, RoutingConfig::default(), 3);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    checkpoint::export_hf(dir, &config, &tensors, &text_config(), None, Some(&gates), DType::F32).unwrap();
    assert!(checkpoint::load(dir).unwrap().gates.is_some());
    export(dir, &config, &tensors);
    assert!(!dir.join(GATES_FILE).exists(), "old gates belonged to the old weights");

    // A folder in the place of the weights makes the rename fail half-way through.
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    fs::create_dir_all(dir.join("model.safetensors/inside")).unwrap();
    let error = checkpoint::export_hf(dir, &config, &tensors, &text_config(), None, None, DType::F32).unwrap_err().to_string();
    assert_mentions(&error, &["cannot write", "model.safetensors"]);
    assert_mentions(&load_error(dir), &["no config.json", "interrupted"]);
    let names: BTreeMap<_, _> = fs::read_dir(dir).unwrap().map(|e| (e.unwrap().file_name(), ())).collect();
    assert!(names.keys().all(|n| !n.to_string_lossy().contains("partial")), "{names:?}");
}

#[test]
fn export_refuses_tensors_that_are_not_the_models() {
    let config = tiny_config(Architecture::Llama);
    let mut tensors = random_tensors(&config, 10);
    let folder = tempfile::tempdir().unwrap();
    let norm = tensors.remove(tensor_names::FINAL_NORM).unwrap();
    let try_export = |tensors: &Tensors| {
        checkpoint::export_hf(folder.path(), &config, tensors, &text_config(), None, None, DType::F32).unwrap_err().to_string()
    };
    assert_mentions(&try_export(&tensors), &[tensor_names::FINAL_NORM, "[32]"]);
    tensors.insert(tensor_names::FINAL_NORM.into(), norm.reshape([4, 8]));
    assert_mentions(&try_export(&tensors), &[tensor_names::FINAL_NORM, "[4, 8]", "[32]"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is written");
}
