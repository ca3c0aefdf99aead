//! A run that is killed between any two items and resumed from its saved state ends in the same bits as one that is not.

use sluice_model::Decoder;
use sluice_spec::{Architecture, ModelConfig, RoutingConfig};
use sluice_testkit::{Rng, small_model};
use sluice_train::distill::Distiller;
use sluice_train::distill_config::DistillConfig;
use sluice_train::documents::Documents;

fn model() -> Decoder {
    let config = ModelConfig { max_seq_len: 2048, ..small_model(Architecture::Qwen2) };
    Decoder::random(&config, 9)
}

/// One or two items of every stage.
fn config() -> DistillConfig {
    let mut config = DistillConfig {
        context: 1200,
        routing: RoutingConfig { window: 8, top_k: 56, route_every: 16, ..RoutingConfig::default() },
        budgets: vec![64, 128],
        ..DistillConfig::default()
    };
    config.stage0.documents = 2;
    config.stage0.samples = 60;
    config.stage0.readers_from = 16;
    config.stage0.slope_documents = 1;
    config.stage1.layer_local_steps = 2;
    config.stage1.end_to_end_steps = 1;
    config.stage2.gate_steps = 1;
    config.stage2.all_steps = 2;
    config.stage3.steps = 2;
    config.stage3.adversarial_share = 0.6;
    config.documents_per_step = 2;
    config
}

fn start() -> Distiller {
    let mut rng = Rng::new(4);
    let documents = (0..3).map(|_| (0..1500).map(|_| rng.below(64) as u32).collect()).collect();
    Distiller::new(model(), None, config(), Documents::new(documents, 600).unwrap()).unwrap()
}

fn bits(distiller: &Distiller) -> Vec<(String, Vec<u32>)> {
    let params = distiller.model.params();
    params.iter().map(|p| (p.name.clone(), p.value.f32().iter().map(|x| x.to_bits()).collect())).collect()
}

#[test]
fn killed_and_resumed_after_every_item_ends_in_the_same_bits() {
    let mut straight = start();
    let mut losses = Vec::new();
    while let Some(report) = straight.step().unwrap() {
        losses.extend(report.loss);
    }
    assert_eq!(losses.len(), 8, "two layer-local steps, one end to end, one with logits, two with all weights, two under attack");
    assert!(losses.iter().all(|l| l.is_finite()));
    assert_ne!(bits(&straight), bits(&start()), "the run changed nothing");

    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.safetensors");
    let mut items = 0;
    loop {
        let mut resumed = start();
        assert_eq!(resumed.resume(&state).unwrap(), items > 0);
        assert_eq!(resumed.progress().0, items);
        if resumed.step().unwrap().is_none() {
            assert_eq!(bits(&resumed), bits(&straight));
            break;
        }
        resumed.save(&state).unwrap();
        items += 1;
    }
    assert_eq!(items, 11);
}

#[test]
fn a_state_of_another_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.safetensors");
    let mut run = start();
    run.step().unwrap();
    run.save(&state).unwrap();
    let mut other = start();
    other.config.seed = 77;
    let error = other.resume(&state).unwrap_err().to_string();
    assert!(error.contains("another configuration"), "{error}");
}
