//! From a float checkpoint through `sluice quantize` to the engine: its logits against the float decoder's.

use std::path::Path;
use std::process::Command;

use sluice_data::embedded::{self, Split};
use sluice_engine::{Engine, Options};
use sluice_model::checkpoint::{self, GATES_FILE, export_hf};
use sluice_model::{AttentionPlan, Cache, Decoder, Policy};
use sluice_spec::{Architecture, GateHeads, ModelConfig, RoutingConfig};
use sluice_tensor::DType;
use sluice_testkit::{Rng, small_model};

/// Gates that look at the token as much as at its age.
fn with_random_gates(mut model: Decoder, heads: GateHeads) -> Decoder {
    model.add_gates(heads);
    let mut rng = Rng::new(5);
    for param in model.params_mut() {
        let scale = match param.name.rsplit('.').next() {
            _ if !param.name.starts_with("sluice.") => continue,
            Some("weight") => 0.1,
            _ => 0.5,
        };
        param.value.f32_mut().iter_mut().for_each(|x| *x = scale * rng.uniform());
    }
    model
}

fn sluice(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_sluice")).args(args).output().expect("the binary runs");
    assert!(output.status.success(), "sluice {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn quantise(model: &str, gates: &Path, folder: &Path, more: &[&str]) -> serde_json::Value {
    let mut args = vec!["quantize", "--model", model, "--gates", gates.to_str().unwrap(), "--out", folder.to_str().unwrap(), "--json"];
    args.extend(more);
    serde_json::from_str(&sluice(&args)).unwrap()
}

struct Agreement {
    kl: f64,
    top1: f64,
    /// Root of the mean squared difference, as a share of the float logits' standard deviation.
    relative: f64,
}

/// Both on the same ids, float in pieces that differ from the engine's.
fn compare(model: &Decoder, routing: RoutingConfig, engine: &mut Engine, ids: &[u32]) -> Agreement {
    let mut cache = Cache::new(&model.config, AttentionPlan::new(Policy::Gate, routing));
    let mut float = Vec::new();
    for piece in ids.chunks(100) {
        let h = model.forward_cached(piece, &mut cache).reshape([piece.len(), model.config.d_model]);
        float.extend_from_slice(model.logits(&h).f32());
    }
    let (mut kl, mut same, mut square, mut spread) = (0.0, 0, 0.0, 0.0);
    let mut sequence = engine.new_sequence();
    let vocab = model.config.vocab_size;
    let each = |i: usize, int8: &[f32]| {
        let float = &float[i * vocab..(i + 1) * vocab];
        let log_softmax = |z: &[f32]| -> Vec<f64> {
            let sum: f64 = z.iter().map(|&z| (z as f64).exp()).sum();
            z.iter().map(|&z| z as f64 - sum.ln()).collect()
        };
        let (p, q) = (log_softmax(float), log_softmax(int8));
        kl += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        let best = |z: &[f32]| (0..vocab).reduce(|a, b| if z[b] > z[a] { b } else { a });
        same += usize::from(best(float) == best(int8));
        let mean = float.iter().map(|&z| z as f64).sum::<f64>() / vocab as f64;
        square += float.iter().zip(int8).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum::<f64>();
        spread += float.iter().map(|&z| (z as f64 - mean).powi(2)).sum::<f64>();
    };
    engine.extend_with_logits(&mut sequence, ids, each).unwrap();
    Agreement { kl: kl / ids.len() as f64, top1: same as f64 / ids.len() as f64, relative: (square / spread).sqrt() }
}

fn ids(n: usize) -> Vec<u32> {
    let documents = embedded::documents();
    let document = documents.iter().find(|d| d.split == Split::Held && d.domain == "docs").unwrap();
    embedded::tokenizer().encode(&document.text)[..n].to_vec()
}

#[test]
fn the_tiny_teacher_in_int8_says_what_it_says_in_float() {
    let temporary = tempfile::tempdir().unwrap();
    let teacher = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-teacher");
    for (heads, group, temperature) in [(GateHeads::KvHead, "32", 0.0), (GateHeads::Shared, "64", 0.5)] {
        let routing = RoutingConfig { window: 32, top_k: 48, route_every: 16, n_sink: 4, gate_heads: heads, gate_temperature: temperature };
        let model = with_random_gates(Decoder::from_checkpoint(&checkpoint::load(&teacher).unwrap()), heads);
        let gates = temporary.path().join(format!("gates-{group}.safetensors"));
        checkpoint::save_gates(&gates, &model.gates(routing, "a test").unwrap(), &model.config).unwrap();
        let folder = temporary.path().join(group);
        let report = quantise("tiny", &gates, &folder, &["--group", group, "--quality-tokens", "300"]);
        let quality = &report["quality"];
        assert!(quality["kl"].as_f64().unwrap() < 0.01 && quality["top1_agreement"].as_f64().unwrap() > 0.93, "{report}");
        assert!(quality["routing_overlap"].as_f64().unwrap() > 0.9, "{report}");
        assert!(quality["nll_difference_replayed"].as_f64().unwrap().abs() < 0.02, "{report}");

        let mut engine = Engine::open(&folder, true, Options::default()).unwrap();
        assert_eq!(*engine.routing(), routing);
        let Agreement { kl, top1, relative } = compare(&model, routing, &mut engine, &ids(700));
        assert!(kl < 0.01 && top1 > 0.93 && relative < 0.06, "{heads:?}: KL {kl}, first choice {top1}, difference {relative}");
        assert!(kl > 0.0, "int8 is not float");

        // Another routing than the artifact's is far away from it: the agreement above is no accident.
        let other = RoutingConfig { window: 4, top_k: 0, ..routing };
        let far = compare(&model, other, &mut engine, &ids(700));
        assert!(far.kl > 4.0 * kl, "KL {} with other keys, {kl} with the same", far.kl);
    }
}

#[test]
fn every_architecture_comes_through() {
    let temporary = tempfile::tempdir().unwrap();
    // Nothing is evicted: with random weights a single other key changes the logits more than all rounding does.
    let routing = RoutingConfig { window: 16, top_k: 200, route_every: 8, ..RoutingConfig::default() };
    for (architecture, tied) in [(Architecture::Llama, true), (Architecture::Qwen2, false), (Architecture::Qwen3, false)] {
        let config =
            ModelConfig { d_model: 96, d_ff: 200, head_dim: 32, vocab_size: 2048, tie_embeddings: tied, ..small_model(architecture) };
        let model = with_random_gates(Decoder::random(&config, 3), GateHeads::KvHead);
        let (tokenizer, name) = (embedded::tokenizer(), architecture.name());
        let (source, folder) = (temporary.path().join(name), temporary.path().join(format!("{name}-int8")));
        let gates = model.gates(routing, "a test").unwrap();
        let json = tokenizer.to_json();
        export_hf(&source, &config, &model.base_tensors(), tokenizer.text_config(), Some(&json), Some(&gates), DType::F32).unwrap();
        quantise(source.to_str().unwrap(), &source.join(GATES_FILE), &folder, &["--quality-tokens", "0"]);
        let mut engine = Engine::open(&folder, true, Options::default()).unwrap();
        let Agreement { relative, .. } = compare(&model, routing, &mut engine, &ids(200));
        assert!(relative < 0.05, "{name}: the logits differ by {relative} of their spread");
    }
}

#[test]
fn generate_reads_artifacts_and_refuses_what_does_not_fit_them() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("tiny-int8");
    let out = folder.to_str().unwrap();
    sluice(&["quantize", "--model", "tiny", "--out", out, "--quality-tokens", "0"]);
    let text = sluice(&["generate", "--model", out, "--prompt", "The river", "-n", "20", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((report["token_ids"].as_array().unwrap().len(), report["policy"].as_str()), (20, Some("streaming")));
    let float = sluice(&["generate", "--model", "tiny", "--policy", "streaming", "--prompt", "The river", "-n", "20", "--json"]);
    let float: serde_json::Value = serde_json::from_str(&float).unwrap();
    assert_eq!(report["token_ids"][0], float["token_ids"][0]);
    for (args, word) in [
        (["generate", "--model", out, "--prompt", "x", "--policy", "dense"], "streaming"),
        (["generate", "--model", out, "--prompt", "x", "--gates", "g.safetensors"], "gates inside"),
        (["quantize", "--model", "tiny", "--quality-tokens", "0", "--out", out], "exists already"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_sluice")).args(args).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(word), "{args:?}: {error}");
    }
}
