//! Dense attention and routed attention with an unlimited budget are different kernels for the same function: their
//! gradients through a whole decoder must agree, for batches, odd lengths and grouped heads.

use sluice_autograd::Tape;
use sluice_model::{AttentionPlan, Decoder, Forward, Policy};
use sluice_spec::{Architecture, ModelConfig, RoutingConfig};
use sluice_testkit::{Rng, max_abs_diff, small_model};

#[test]
fn unlimited_routing_has_the_gradients_of_dense_attention() {
    let config = ModelConfig { d_model: 64, d_ff: 96, head_dim: 32, vocab_size: 50, max_seq_len: 256, ..small_model(Architecture::Qwen2) };
    let mut model = Decoder::random(&config, 5);
    model.set_trainable(|_| true);
    for (t, lens) in [(128, vec![128, 128, 128]), (129, vec![129, 77]), (200, vec![200])] {
        let mut rng = Rng::new(t as u64);
        let tokens: Vec<u32> = (0..t * lens.len()).map(|_| rng.below(50) as u32).collect();
        let targets: Vec<u32> = (0..t * lens.len()).map(|_| rng.below(50) as u32).collect();
        let weights: Vec<f32> = (0..t * lens.len()).map(|i| if i % t < lens[i / t] { 1.0 / t as f32 } else { 0.0 }).collect();
        let step = |plan: &AttentionPlan| {
            let tape = Tape::recording();
            let h = model.forward(&tape, &tokens, &lens, plan, Forward::default()).h;
            let flat = tape.reshape(&h, [tokens.len(), 64]);
            let (loss, _) = tape.cross_entropy(&flat, &tape.param(model.head()), &targets, &weights);
            (loss.value().item(), tape.backward_scalar(&loss).into_params())
        };
        let (dense_loss, dense) = step(&AttentionPlan::dense());
        for route_every in [1, 16, 64] {
            let routing = RoutingConfig { window: 8, top_k: 256, route_every, ..RoutingConfig::default() };
            let (loss, grads) = step(&AttentionPlan::new(Policy::Streaming, routing));
            assert!((loss - dense_loss).abs() < 1e-4, "{loss} {dense_loss}");
            for (name, want) in &dense {
                let scale = want.f32().iter().fold(1e-4f32, |m, g| m.max(g.abs()));
                let difference = max_abs_diff(grads[name].f32(), want.f32());
                assert!(difference < 1e-3 * scale, "T = {t}, every {route_every}: {name} differs by {difference} of {scale}");
            }
        }
    }
}
