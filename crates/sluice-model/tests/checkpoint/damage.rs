//! Damaged files: cut off anywhere, absurd sizes, random bytes. Always an error that names the file or a
//! whole model, never a panic, never an allocation beyond a small multiple of the file.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use sluice_model::checkpoint::{self, tensor_shapes};
use sluice_spec::{Architecture, ModelConfig, RoutingConfig};
use sluice_tensor::DType;

use super::gates::random_gates;
use super::support::*;

fn config() -> ModelConfig {
    ModelConfig { n_layers: 1, ..tiny_config(Architecture::Llama) }
}

/// A small valid GGUF with every kind of metadata that we use, and where its header ends.
fn valid_gguf() -> (Vec<u8>, usize) {
    let config = config();
    let mut gguf = Gguf::of_model(&config, &random_tensors(&config, 1));
    gguf.restore("token_embd.weight", Q8_0);
    gguf.restore("blk.0.attn_k.weight", F16);
    gguf.set("tokenizer.ggml.model", text_value("gpt2"));
    gguf.set("tokenizer.ggml.tokens", texts_value(&["a", "b"]));
    gguf.set("tokenizer.ggml.token_type", array_value(5, &[vec![1, 0, 0, 0], vec![3, 0, 0, 0]]));
    gguf.set("tokenizer.ggml.merges", texts_value(&["a b"]));
    gguf.set("tokenizer.ggml.eos_token_id", u32_value(1));
    gguf.bytes()
}

/// A small valid folder with gates.
fn valid_folder(dir: &Path) {
    let config = config();
    let gates = random_gates(&config, RoutingConfig::default(), 1);
    checkpoint::export_hf(dir, &config, &random_tensors(&config, 1), &text_config(), Some("{}"), Some(&gates), DType::F32).unwrap();
}

/// Load bytes as `name` in `dir`; an error must name the file and a success must be a whole model.
fn check(dir: &Path, name: &str, bytes: &[u8], load: &Path) -> Result<(), String> {
    let file: PathBuf = dir.join(name);
    // A new file each time: ext4 flushes one that is cut short and written again, ten thousand times here.
    let _ = fs::remove_file(&file);
    fs::write(&file, bytes).unwrap();
    match checkpoint::load(load) {
        Ok(loaded) => {
            let shapes = tensor_shapes(&loaded.config);
            assert!(loaded.tensors.iter().map(|(n, t)| (n.as_str(), t.shape())).eq(shapes.iter().map(|(n, s)| (n.as_str(), s.as_slice()))));
            Ok(())
        }
        Err(e) => {
            let message = e.to_string();
            assert!(message.contains(&*load.to_string_lossy()), "the message does not name {}: {message}", load.display());
            assert!(message.len() < 2000, "a message of {} bytes: {message}", message.len());
            Err(message)
        }
    }
}

#[test]
fn gguf_cut_off_at_any_byte_is_an_error() {
    let (bytes, header) = valid_gguf();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    check(folder.path(), "m.gguf", &bytes, &path).unwrap();
    for len in (0..=header).chain((header..bytes.len()).step_by(97)).chain([bytes.len() - 1]) {
        check(folder.path(), "m.gguf", &bytes[..len], &path).expect_err(&format!("{len} of {} bytes load", bytes.len()));
    }
    let message = check(folder.path(), "m.gguf", &bytes[..bytes.len() - 1], &path).unwrap_err();
    assert_mentions(&message, &["past the", "cut off"]);
}

#[test]
fn safetensors_and_config_cut_off_at_any_byte_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    valid_folder(dir);
    for name in ["model.safetensors", "gates.safetensors", "config.json", "generation_config.json", "tokenizer_config.json"] {
        let bytes = fs::read(dir.join(name)).unwrap();
        let json = name.ends_with("json");
        // The newline at the end of a JSON file is not missed.
        let end = bytes.len() - usize::from(json);
        let header = if json { end } else { 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize };
        for len in (0..header).chain((header..end).step_by(97)).chain([end - 1]) {
            check(dir, name, &bytes[..len], dir).expect_err(&format!("{len} of {} bytes of {name} load", bytes.len()));
        }
        check(dir, name, &bytes, dir).unwrap();
    }
}

#[test]
fn trailing_bytes_after_safetensors_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    valid_folder(folder.path());
    let mut bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
    bytes.push(0);
    let message = check(folder.path(), "model.safetensors", &bytes, folder.path()).unwrap_err();
    assert_mentions(&message, &["model.safetensors", "exactly"]);
}

#[test]
fn absurd_numbers_in_a_gguf_header_are_errors() {
    let (bytes, header) = valid_gguf();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    // Every aligned and unaligned u64 of the header in turn: counts, lengths, sizes and offsets are among them.
    for absurd in [u64::MAX, 1 << 60, 1 << 33] {
        for at in 4..header - 8 {
            let mut damaged = bytes.clone();
            damaged[at..at + 8].copy_from_slice(&absurd.to_le_bytes());
            let _: Result<(), String> = check(folder.path(), "m.gguf", &damaged, &path);
        }
        for (at, words) in [(8, "tensors"), (16, "metadata pairs"), (24, "metadata key")] {
            let mut damaged = bytes.clone();
            damaged[at..at + 8].copy_from_slice(&absurd.to_le_bytes());
            let message = check(folder.path(), "m.gguf", &damaged, &path).unwrap_err();
            assert_mentions(&message, &[words, &absurd.to_string()]);
        }
    }
}

#[test]
fn overlapping_and_misplaced_tensors_are_errors() {
    let config = config();
    let gguf = Gguf::of_model(&config, &random_tensors(&config, 2));
    let (bytes, header) = gguf.bytes();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    // The last eight bytes of the header are the last tensor's offset.
    for (offset, word) in [(0u64, "same place"), (32, "same place"), (1, "alignment"), (1 << 50, "past the"), (u64::MAX - 31, "past the")] {
        let mut damaged = bytes.clone();
        damaged[header - 8..header].copy_from_slice(&offset.to_le_bytes());
        assert_mentions(&check(folder.path(), "m.gguf", &damaged, &path).unwrap_err(), &[word]);
    }
}

#[test]
fn absurd_safetensors_headers_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    valid_folder(dir);
    let name = "model.safetensors";
    let info = |shape: &str, begin: u64, end: u64| format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#);
    for (header, words) in [
        ("".to_string(), "does not parse"),
        ("[]".into(), "does not parse"),
        ("[".repeat(100_000), "does not parse"),
        ("{\"a\":".repeat(100_000), "does not parse"),
        (format!(r#"{{"a":{},"a":{}}}"#, info("[1]", 0, 4), info("[1]", 0, 4)), "twice"),
        (format!(r#"{{"a":{},"b":{}}}"#, info("[1]", 0, 4), info("[1]", 0, 4)), "overlaps"),
        (format!(r#"{{"a":{}}}"#, info("[1]", 4, 8)), "gaps"),
        (format!(r#"{{"a":{}}}"#, info("[1]", 8, 4)), "exactly that size"),
        (format!(r#"{{"a":{}}}"#, info("[1152921504606846976]", 0, 8)), "exactly that size"),
        (format!(r#"{{"a":{}}}"#, info("[4294967296,4294967296]", 0, 8)), "exactly that size"),
        (format!(r#"{{"a":{}}}"#, info("[4611686018427387904]", 0, 0)), "exactly that size"),
        (format!(r#"{{"a":{}}}"#, info("[1e3]", 0, 4000)), "does not parse"),
        (format!(r#"{{"a":{}}}"#, info("[-1]", 0, 4)), "does not parse"),
        (r#"{"a":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}}"#.into(), "F7"),
        (r#"{"a":{"dtype":"F32","shape":[1]}}"#.into(), "data_offsets"),
    ] {
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 8]].concat();
        assert_mentions(&check(dir, name, &bytes, dir).unwrap_err(), &[name, words]);
    }
    for len in [u64::MAX, 1 << 60, 1 << 40, 100_000_001, 100_000_000] {
        let bytes = [&len.to_le_bytes()[..], b"{}"].concat();
        assert_mentions(&check(dir, name, &bytes, dir).unwrap_err(), &[name, &len.to_string()]);
    }
}

/// Places and new bytes for one damaged file; most of them in the header, where they hurt.
fn edits() -> impl Strategy<Value = Vec<(f64, bool, Vec<u8>)>> {
    let number = prop_oneof![Just(0u64), Just(1), Just(u64::MAX), Just(1 << 60), Just(1 << 31), any::<u64>()];
    let bytes = prop_oneof![any::<u8>().prop_map(|b| vec![b]), number.prop_map(|n| n.to_le_bytes().to_vec())];
    prop::collection::vec((0.0..1.0f64, prop::bool::weighted(0.9), bytes), 1..4)
}

fn damage(bytes: &[u8], header: usize, edits: &[(f64, bool, Vec<u8>)]) -> Vec<u8> {
    let mut damaged = bytes.to_vec();
    for (place, in_header, new) in edits {
        let range = if *in_header { header } else { bytes.len() };
        let at = ((place * range as f64) as usize).min(bytes.len() - new.len());
        damaged[at..at + new.len()].copy_from_slice(new);
    }
    damaged
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_damage_to_a_gguf_never_panics(edits in edits()) {
        thread_local! {
            static VALID: (Vec<u8>, usize, tempfile::TempDir) = {
                let (bytes, header) = valid_gguf();
                (bytes, header, tempfile::tempdir().unwrap())
            };
        }
        VALID.with(|(bytes, header, folder)| {
            let path = folder.path().join("m.gguf");
            let _: Result<(), String> = check(folder.path(), "m.gguf", &damage(bytes, *header, &edits), &path);
        });
    }

    #[test]
    fn random_damage_to_a_folder_never_panics(edits in edits(), which in 0..6usize) {
        const NAMES: [&str; 6] =
            ["model.safetensors", "gates.safetensors", "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"];
        thread_local! {
            static FOLDER: tempfile::TempDir = {
                let folder = tempfile::tempdir().unwrap();
                valid_folder(folder.path());
                folder
            };
        }
        FOLDER.with(|folder| {
            let (dir, name) = (folder.path(), NAMES[which]);
            let bytes = fs::read(dir.join(name)).unwrap();
            let header = if name.ends_with("json") { bytes.len() } else { 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize };
            let edits: Vec<_> = edits.into_iter().map(|(p, h, new)| (p, h, new.into_iter().take(bytes.len()).collect())).collect();
            let _: Result<(), String> = check(dir, name, &damage(&bytes, header, &edits), dir);
            fs::remove_file(dir.join(name)).unwrap();
            fs::write(dir.join(name), bytes).unwrap();
        });
    }
}
