//! The counted peak of a distillation step against the measured one. Alone in its file: the counters are process-wide.

use sluice_model::{Decoder, train_memory};
use sluice_spec::{Architecture, ModelConfig, RoutingConfig};
use sluice_tensor::memory;
use sluice_testkit::{Rng, small_model};
use sluice_train::distill::{Distiller, Split};
use sluice_train::distill_config::DistillConfig;
use sluice_train::documents::Documents;

/// Largest relative difference; what the count leaves out (`train_memory`'s first lines) is below it.
const TOLERANCE: f64 = 0.06;

const CONTEXT: usize = 1400;

fn distiller(all_weights: bool) -> Distiller {
    let model = ModelConfig {
        n_layers: 6,
        d_model: 64,
        d_ff: 192,
        head_dim: 16,
        vocab_size: 512,
        max_seq_len: 2048,
        ..small_model(Architecture::Llama)
    };
    let mut config = DistillConfig {
        context: CONTEXT,
        routing: RoutingConfig { window: 16, top_k: 48, route_every: 16, ..RoutingConfig::default() },
        budgets: vec![64, 128],
        documents_per_step: 3,
        ..DistillConfig::default()
    };
    config.keep_stages(&[2]);
    (config.stage2.gate_steps, config.stage2.all_steps) = if all_weights { (0, 2) } else { (2, 0) };
    let mut rng = Rng::new(4);
    let documents = (0..4).map(|_| (0..CONTEXT + 9).map(|_| rng.below(512) as u32).collect()).collect();
    Distiller::new(Decoder::random(&model, 9), None, config, Documents::new(documents, CONTEXT).unwrap()).unwrap()
}

#[test]
fn the_counted_peak_is_the_measured_one_and_no_choice_of_layers_changes_a_bit() {
    for all_weights in [false, true] {
        let mut learned = Vec::new();
        for split in [(3, 0), (3, 4), (3, 6), (1, 0), (1, 6)].map(|(documents, recompute)| Split { documents, recompute }) {
            let before = memory::current_bytes();
            let mut run = distiller(all_weights);
            run.split = split;
            run.step().unwrap();
            memory::reset_peak();
            let loss = run.step().unwrap().unwrap().loss;
            let ratio = (memory::peak_bytes() - before) as f64 / run.predicted_peak(split) as f64;
            assert!((ratio - 1.0).abs() <= TOLERANCE, "all weights {all_weights}, {split:?}: measured over counted {ratio:.4}");
            learned.push((split.documents, loss, bits(&run)));
        }
        for side_by_side in learned.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
            assert!(side_by_side[0] == side_by_side[1], "all weights {all_weights}: losses and weights differ");
        }
    }
    check_that_a_budget_is_met_by_the_fewest_layers_that_run_again();
}

fn bits(run: &Distiller) -> Vec<u32> {
    run.model.params().iter().flat_map(|p| p.value.f32().iter().map(|x| x.to_bits()).collect::<Vec<_>>()).collect()
}

fn check_that_a_budget_is_met_by_the_fewest_layers_that_run_again() {
    let mut run = distiller(false);
    let chosen = [0, 1, 5, 6].map(|recompute| Split { documents: 1, recompute });
    let needs = |run: &Distiller, split| train_memory::with_margin(run.predicted_peak(split));
    for split in chosen {
        run.fit_memory(needs(&run, split)).unwrap();
        assert_eq!(run.split, split);
    }
    let least = needs(&run, chosen[3]);
    let error = run.fit_memory(least - 1).unwrap_err().to_string();
    assert!(error.contains(&format!("needs {} MiB", least.div_ceil(1 << 20))) && error.contains("lower `context`"), "{error}");
}
