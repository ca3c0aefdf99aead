//! Speed of the engine by context, for an artifact or for random weights in the shape of a model of 135 million parameters, where
//! no model is at hand: `cargo run --release -p sluice-engine --example engine_speed -- THREADS INSTRUCTIONS [ARTIFACT] CONTEXT..`
#![expect(clippy::print_stdout, reason = "a measurement prints its table")]

use std::path::Path;
use std::time::Instant;

use sluice_engine::{Artifact, ArtifactBuilder, Engine, Options};
use sluice_kernels::int8_linear::InstructionSet;
use sluice_spec::artifact::{self, Provenance, TensorKind};
use sluice_spec::{Architecture, ModelConfig, RoutingConfig, TextConfig};
use sluice_testkit::Rng;

fn main() {
    let mut args = std::env::args().skip(1).peekable();
    let threads = args.next().map_or(2, |n| n.parse().expect("a number of threads"));
    let instructions = match args.next() {
        Some(name) => InstructionSet::ALL.into_iter().find(|set| set.name() == name).expect("the name of an instruction set"),
        None => InstructionSet::best(),
    };
    let path = args.next_if(|arg| arg.parse::<usize>().is_err());
    let mut contexts: Vec<usize> = args.map(|arg| arg.parse().expect("a context in tokens")).collect();
    if contexts.is_empty() {
        contexts = vec![512, 8192];
    }
    let artifact = path.map_or_else(random, |path| Artifact::open(Path::new(&path), false).expect("an artifact"));
    let weights = artifact.weight_bytes() as f64;
    let mut engine = Engine::new(artifact, Options { threads, instructions, ..Options::default() }).expect("fitting options");
    let read = (0..7)
        .map(|_| {
            let started = Instant::now();
            std::hint::black_box(engine.read_weights());
            started.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    println!(
        "{}, {threads} threads; weights read at {:.1} GB/s, {:.0} times a second",
        instructions.name(),
        weights / read / 1e9,
        1.0 / read
    );
    let vocab_size = engine.model().vocab_size;
    for context in contexts {
        let ids: Vec<u32> = (0..context + 32).map(|i| ((100 + i * 7919) % vocab_size) as u32).collect();
        let mut sequence = engine.new_sequence();
        let started = Instant::now();
        engine.extend(&mut sequence, &ids[..context]).expect("ids of the vocabulary");
        let prefill = context as f64 / started.elapsed().as_secs_f64();
        let mut seconds: Vec<f64> = ids[context..]
            .iter()
            .map(|&id| {
                let started = Instant::now();
                engine.extend(&mut sequence, &[id]).expect("an id of the vocabulary");
                started.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        let decode = 1.0 / seconds[seconds.len() / 2];
        println!("{context:>7} tokens: prefill {prefill:>7.1}, decode {decode:>6.1} tokens/s, {:.0} % of the limit", 100.0 * decode * read);
    }
}

/// Random weights and gates in the shape of SmolLM2-135M, with the default budget.
fn random() -> Artifact {
    let model = ModelConfig {
        architecture: Architecture::Llama,
        n_layers: 30,
        d_model: 576,
        d_ff: 1536,
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        vocab_size: 49_152,
        max_seq_len: 8192,
        norm_eps: 1e-5,
        rope_theta: 1e5,
        rope_scaling: None,
        tie_embeddings: true,
        qkv_bias: false,
        qk_norm: false,
    };
    let routing = RoutingConfig::preset("default").expect("a preset");
    let provenance = Provenance { model: "random".into(), model_sha256: None, gates_sha256: None, made_by: "an example".into() };
    let mut builder = ArtifactBuilder::new(model.clone(), routing, true, 32, TextConfig::default(), "{}".into(), provenance);
    let mut rng = Rng::new(1);
    for (name, kind) in artifact::tensors(&model, &routing, true) {
        let (n, scale) = match kind {
            TensorKind::Int8 { rows, cols } => (rows * cols, 1.0 / (cols as f32).sqrt()),
            TensorKind::F32 { len } => (len, 1.0),
        };
        builder.add(&name, &(0..n).map(|_| scale * rng.normal()).collect::<Vec<f32>>()).expect("a tensor of the model");
    }
    builder.finish().expect("all tensors")
}
