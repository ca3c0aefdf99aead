//! Gate files: round trip, size, and refusals.

use sluice_model::checkpoint::{GATES_FILE, GateTensors, Gates, load_gates, save_gates};
use sluice_spec::{Architecture, GateHeads, ModelConfig, RoutingConfig};
use sluice_tensor::Tensor;
use sluice_testkit::Rng;

use super::support::*;

pub(crate) fn random_gates(base: &ModelConfig, routing: RoutingConfig, seed: u64) -> Gates {
    let heads = if routing.gate_heads == GateHeads::Shared { 1 } else { base.n_kv_heads };
    let mut rng = Rng::new(seed);
    let layers = (0..base.n_layers)
        .map(|_| GateTensors {
            weight: rng.normal_tensor([heads, base.d_model]),
            bias: rng.normal_tensor([heads]),
            recency: rng.normal_tensor([heads]),
        })
        .collect();
    Gates { routing, layers, note: format!("seed {seed}") }
}

#[test]
fn gates_survive_a_round_trip_from_a_file_and_from_a_folder() {
    let base = tiny_config(Architecture::Llama);
    for preset in ["paper", "default"] {
        let gates = random_gates(&base, RoutingConfig::preset(preset).unwrap(), 1);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(GATES_FILE);
        save_gates(&path, &gates, &base).unwrap();
        for from in [path.as_path(), folder.path()] {
            let loaded = load_gates(from, &base).unwrap();
            assert_eq!((loaded.routing, &loaded.note, loaded.layers.len()), (gates.routing, &gates.note, gates.layers.len()));
            for (got, want) in loaded.layers.iter().zip(&gates.layers) {
                for (got, want) in [(&got.weight, &want.weight), (&got.bias, &want.bias), (&got.recency, &want.recency)] {
                    assert_eq!((got.shape(), got.f32()), (want.shape(), want.f32()));
                }
            }
        }
        assert_mentions(&load_error(&path), &["gate file", "base model"]);
    }
}

#[test]
fn gates_of_a_135m_model_take_about_200_kilobytes() {
    let base = ModelConfig { n_layers: 30, d_model: 576, n_heads: 9, n_kv_heads: 3, head_dim: 64, ..tiny_config(Architecture::Llama) };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("g.safetensors");
    save_gates(&path, &random_gates(&base, RoutingConfig::default(), 2), &base).unwrap();
    let bytes = std::fs::metadata(&path).unwrap().len();
    assert!((207_000..225_000).contains(&bytes), "{bytes} bytes");
}

#[test]
fn gates_for_another_base_model_are_refused_naming_both() {
    let base = tiny_config(Architecture::Llama);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("g.safetensors");
    save_gates(&path, &random_gates(&base, RoutingConfig::default(), 3), &base).unwrap();
    let others = [
        ModelConfig { n_layers: 3, ..base.clone() },
        ModelConfig { d_model: 64, ..base.clone() },
        ModelConfig { n_kv_heads: 4, ..base.clone() },
        ModelConfig { vocab_size: 41, ..base.clone() },
        tiny_config(Architecture::Qwen3),
    ];
    for other in others {
        let message = load_gates(&path, &other).unwrap_err().to_string();
        assert_mentions(&message, &["g.safetensors", "llama model of 2 layers, d_model 32", "vocabulary 40"]);
        assert_mentions(&message, &[&format!("{} model of {} layers", other.architecture.name(), other.n_layers)]);
    }
    // Not a matter of shape: the same base read from another format.
    load_gates(&path, &ModelConfig { tie_embeddings: false, max_seq_len: 256, ..base }).unwrap();
}

#[test]
fn gates_that_cannot_work_are_not_written() {
    let base = tiny_config(Architecture::Llama);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("g.safetensors");
    let good = random_gates(&base, RoutingConfig::default(), 4);
    let refused = |edit: &dyn Fn(&mut Gates)| {
        let mut gates = good.clone();
        edit(&mut gates);
        let message = save_gates(&path, &gates, &base).unwrap_err().to_string();
        assert!(!path.exists());
        message
    };
    assert_mentions(&refused(&|g| drop(g.layers.pop())), &["1 layers", "2"]);
    assert_mentions(&refused(&|g| g.layers[1].bias = Tensor::zeros([1])), &["sluice.layers.1.gate.bias", "[1]", "[2]"]);
    assert_mentions(&refused(&|g| g.routing.gate_heads = GateHeads::Shared), &["[2, 32]", "[1, 32]"]);
    assert_mentions(&refused(&|g| g.layers[0].recency = Tensor::full(f32::NAN, [2])), &["NaN", "recency"]);
}

#[test]
fn files_that_are_not_gates_are_refused() {
    let base = tiny_config(Architecture::Llama);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(GATES_FILE);
    assert_mentions(&load_gates(folder.path(), &base).unwrap_err().to_string(), &["cannot open", GATES_FILE]);
    std::fs::write(&path, safetensors::serialize::<&str, safetensors::tensor::TensorView<'_>, _>([], None).unwrap()).unwrap();
    assert_mentions(&load_gates(&path, &base).unwrap_err().to_string(), &["no `format`"]);

    save_gates(&path, &random_gates(&base, RoutingConfig::default(), 5), &base).unwrap();
    let good = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(*good.first_chunk().unwrap()) as usize;
    let text = String::from_utf8(good[8..8 + header].to_vec()).unwrap();
    let with_header = |header: String| {
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &good[8 + text.len()..]].concat();
        std::fs::write(&path, bytes).unwrap();
        load_gates(&path, &base).unwrap_err().to_string()
    };
    for (from, to, word) in [
        ("\"version\":\"1\"", "\"version\":\"2\"", "version \"2\""),
        ("\\\"window\\\":128", "\\\"window\\\":0", "window is 0"),
        ("\\\"window\\\":128", "\\\"window\\\":-1", "routing"),
        ("sluice.layers.1.gate.bias", "sluice.layers.7.gate.bias", "no tensor `sluice.layers.1.gate.bias`"),
        ("\"shape\":[2,32]", "\"shape\":[32,2]", "[32, 2]"),
    ] {
        assert!(text.contains(from), "{text}");
        assert_mentions(&with_header(text.replace(from, to)), &[GATES_FILE, word]);
    }
    // One infinite weight in the data.
    let mut bytes = good.clone();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    assert_mentions(&load_gates(&path, &base).unwrap_err().to_string(), &["inf", "finite"]);
}
