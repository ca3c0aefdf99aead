//! Artifact folders: a round trip, and every kind of damage as an error that says where, what and what instead.

mod support;

use std::fs;
use std::path::Path;

use sluice_engine::{Artifact, Engine, Options};
use sluice_spec::Architecture;
use support::{artifact, model, routing, tokens};

fn written(folder: &Path) {
    artifact(&model(Architecture::Qwen2), routing(), 64).write(folder).unwrap();
}

fn error_of(folder: &Path, verify: bool) -> String {
    match Artifact::open(folder, verify) {
        Ok(_) => panic!("{} was opened", folder.display()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_folder_survives_a_round_trip() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("deep/model");
    written(&folder);
    assert!(Artifact::is_at(&folder) && !Artifact::is_at(temporary.path()));
    let logits = |artifact: Artifact| {
        let mut engine = Engine::new(artifact, Options { threads: 1, ..Options::default() }).unwrap();
        let mut sequence = engine.new_sequence();
        engine.extend(&mut sequence, &tokens(40)).unwrap().to_vec()
    };
    let made = artifact(&model(Architecture::Qwen2), routing(), 64);
    let read = Artifact::open(&folder, true).unwrap();
    assert_eq!(read.manifest, made.manifest);
    assert_eq!(logits(read), logits(made));
    let left: Vec<_> = fs::read_dir(folder.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["model"], "nothing is left beside it");
}

#[test]
fn an_existing_folder_is_never_overwritten() {
    let temporary = tempfile::tempdir().unwrap();
    fs::write(temporary.path().join("mine"), "precious").unwrap();
    let error = artifact(&model(Architecture::Llama), routing(), 32).write(temporary.path()).unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
    assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 1);
}

#[test]
fn damage_is_named() {
    let edit = |folder: &Path, from: &str, to: &str| {
        let path = folder.join("manifest.json");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{from}");
        fs::write(path, text.replacen(from, to, 1)).unwrap();
    };
    let shorten = |path: &Path| {
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    };
    type Damage = Box<dyn Fn(&Path)>;
    let cases: [(&str, Damage, &[&str]); 9] = [
        ("newer", Box::new(move |f| edit(f, "\"version\": 1", "\"version\": 2")), &["manifest.json", "version 2", "expected 1"]),
        ("other format", Box::new(move |f| edit(f, "sluice-artifact", "onnx")), &["manifest.json", "`onnx`", "sluice-artifact"]),
        ("unknown field", Box::new(move |f| edit(f, "\"group\"", "\"grop\"")), &["manifest.json", "grop"]),
        ("impossible group", Box::new(move |f| edit(f, "\"group\": 64", "\"group\": 48")), &["manifest.json", "48", "[32, 64]"]),
        ("other shape", Box::new(move |f| edit(f, "\"d_ff\": 100", "\"d_ff\": 104")), &["manifest.json", "tensor"]),
        ("cut weights", Box::new(move |f| shorten(&f.join("weights.bin"))), &["weights.bin", "bytes", "manifest"]),
        ("cut tokenizer", Box::new(move |f| shorten(&f.join("tokenizer.json"))), &["tokenizer.json", "1 bytes", "2 bytes"]),
        ("no weights", Box::new(|f| fs::remove_file(f.join("weights.bin")).unwrap()), &["weights.bin", "cannot open"]),
        ("cut manifest", Box::new(move |f| shorten(&f.join("manifest.json"))), &["manifest.json", "JSON"]),
    ];
    for (what, damage, words) in &cases {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("model");
        written(&folder);
        damage(&folder);
        let error = error_of(&folder, false);
        assert!(words.iter().all(|word| error.contains(word)), "{what}: {error}");
    }
}

#[test]
fn a_flipped_bit_is_found_when_asked_for() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("model");
    written(&folder);
    let path = folder.join("weights.bin");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(Artifact::open(&folder, false).is_ok());
    let error = error_of(&folder, true);
    assert!(error.contains("weights.bin") && error.contains("SHA-256"), "{error}");
}

#[test]
fn a_tensor_outside_its_file_is_refused() {
    let temporary = tempfile::tempdir().unwrap();
    for offset in ["1", "99999936", "18446744073709551552"] {
        let folder = temporary.path().join(offset);
        written(&folder);
        let path = folder.join("manifest.json");
        let mut manifest: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        manifest["tensors"]["embed"]["offset"] = serde_json::from_str(offset).unwrap();
        fs::write(&path, manifest.to_string()).unwrap();
        let error = error_of(&folder, false);
        assert!(error.contains("weights.bin") && error.contains("`embed`"), "{error}");
    }
}
