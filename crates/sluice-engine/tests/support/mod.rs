#![allow(dead_code, reason = "each test binary uses a part")]
//! Small random artifacts.

use sluice_engine::{Artifact, ArtifactBuilder};
use sluice_spec::artifact::{self, Provenance, TensorKind};
use sluice_spec::{Architecture, GateHeads, ModelConfig, RoutingConfig, TextConfig};
use sluice_testkit::{Rng, small_model};

/// A decoder with awkward sizes: no width is a multiple of a group, the vocabulary not of a tile.
pub(crate) fn model(architecture: Architecture) -> ModelConfig {
    ModelConfig {
        d_model: 72,
        d_ff: 100,
        n_heads: 6,
        head_dim: 20,
        vocab_size: 101,
        tie_embeddings: architecture == Architecture::Llama,
        ..small_model(architecture)
    }
}

/// A budget that evicts soon, with the gate's bias on.
pub(crate) fn routing() -> RoutingConfig {
    RoutingConfig { window: 9, top_k: 12, route_every: 8, n_sink: 2, gate_heads: GateHeads::KvHead, gate_temperature: 0.5 }
}

/// Random weights, scaled so that every part of the model matters.
pub(crate) fn artifact(model: &ModelConfig, routing: RoutingConfig, group: usize) -> Artifact {
    let mut rng = Rng::new(11);
    let provenance = Provenance { model: "random".into(), model_sha256: None, gates_sha256: None, made_by: "a test".into() };
    let mut builder = ArtifactBuilder::new(model.clone(), routing, true, group, TextConfig::default(), "{}".into(), provenance);
    for (name, kind) in artifact::tensors(model, &routing, true) {
        let (n, scale) = match kind {
            TensorKind::Int8 { rows, cols } => (rows * cols, 1.5 / (cols as f32).sqrt()),
            TensorKind::F32 { len } => (len, 1.0),
        };
        builder.add(&name, &(0..n).map(|_| scale * rng.normal()).collect::<Vec<f32>>()).unwrap();
    }
    builder.finish().unwrap()
}

/// Seeded token ids.
pub(crate) fn tokens(n: usize) -> Vec<u32> {
    let mut rng = Rng::new(21);
    (0..n).map(|_| rng.below(101) as u32).collect()
}
