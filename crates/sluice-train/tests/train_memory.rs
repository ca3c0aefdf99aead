//! The counted peak of a training step against the measured one. Alone in its file: the counters are process-wide.

use sluice_model::train_memory;
use sluice_spec::{Architecture, ModelConfig};
use sluice_tensor::memory;
use sluice_testkit::small_model;
use sluice_train::pretrain::{Batch, DataConfig, Phase, Pretrainer, TrainConfig};

/// Largest relative difference; what the count leaves out (`train_memory`'s first lines) is below it.
const TOLERANCE: f64 = 0.04;

#[test]
fn predicted_peak_is_the_measured_one_and_no_choice_of_layers_changes_a_bit() {
    let (few_tokens, many_tokens) = ((1, 64), (3, 256));
    for (batch, context) in [few_tokens, many_tokens] {
        let measured = [0, 2, 6].map(|recompute| {
            let (measured, weights) = measure(batch, context, recompute);
            let predicted = train_memory::dense(&config(), batch, context, recompute).peak_bytes as f64;
            let ratio = measured / predicted;
            assert!(
                (ratio - 1.0).abs() <= TOLERANCE,
                "{batch} x {context} tokens, {recompute} layers again: measured {measured}, predicted {predicted}, ratio {ratio:.4}"
            );
            (measured, weights)
        });
        assert!(measured[0].1 == measured[1].1 && measured[0].1 == measured[2].1, "weights after two steps");
        if (batch, context) == many_tokens {
            // Here activations outweigh the weights.
            assert!(measured[1].0 < 0.9 * measured[0].0 && measured[2].0 < 0.6 * measured[0].0, "{:?}", measured.map(|m| m.0));
        }
    }
    check_that_a_budget_is_met_by_the_fewest_layers_that_run_again();
}

fn check_that_a_budget_is_met_by_the_fewest_layers_that_run_again() {
    let mut trainer = trainer(3, 256);
    for recompute in [0, 2, 6] {
        let counted = train_memory::dense(&config(), 3, 256, recompute).peak_bytes;
        assert_eq!((trainer.fit_memory(train_memory::with_margin(counted)).unwrap(), trainer.recompute), (counted, recompute));
    }
    let least = train_memory::with_margin(train_memory::dense(&config(), 3, 256, 6).peak_bytes);
    let error = trainer.fit_memory(least - 1).unwrap_err().to_string();
    assert!(error.contains(&format!("3 x 256 tokens needs {} MiB", least.div_ceil(1 << 20))), "{error}");
}

fn config() -> ModelConfig {
    ModelConfig { n_layers: 6, d_model: 64, d_ff: 192, head_dim: 16, vocab_size: 512, ..small_model(Architecture::Llama) }
}

fn trainer(batch: usize, context: usize) -> Pretrainer {
    Pretrainer::new(TrainConfig {
        seed: 1,
        model: config(),
        optimizer: Default::default(),
        data: DataConfig { recall_share: 0.0, answer_weight: 1.0, text: Vec::new() },
        phases: vec![Phase { steps: 2, context, batch, copy_share: 0.0, drill: false }],
        checkpoint: false,
    })
}

/// Peak of the second step, and the bits of all weights after it.
fn measure(batch: usize, context: usize, recompute: usize) -> (f64, Vec<u32>) {
    let before = memory::current_bytes();
    let mut trainer = trainer(batch, context);
    trainer.recompute = recompute;
    let sequence = |row: u32| ((0..=context as u32).map(|i| (i * 37 + row * 11) % 512).collect(), vec![1.0; context + 1]);
    let data = Batch::of(&(0..batch as u32).map(sequence).collect::<Vec<_>>());
    // The moments are allocated in the first step.
    trainer.step(&data).unwrap();
    memory::reset_peak();
    trainer.step(&data).unwrap();
    let bits = trainer.model.params().iter().flat_map(|p| p.value.f32().iter().map(|x| x.to_bits()).collect::<Vec<_>>()).collect();
    ((memory::peak_bytes() - before) as f64, bits)
}
