//! What a routed decoder promises, whatever its gates say: a huge budget is dense attention, a constant gate is
//! StreamingLLM, and token-by-token decoding is the same function as prefill within a bounded cache.

use sluice_autograd::Tape;
use sluice_model::{AttentionPlan, Cache, Decoder, Forward, Policy};
use sluice_spec::{Architecture, GateHeads, ModelConfig, RoutingConfig};
use sluice_tensor::Tensor;
use sluice_testkit::{Rng, max_abs_diff, small_model};

fn config(architecture: Architecture) -> ModelConfig {
    ModelConfig { n_layers: 3, tie_embeddings: architecture != Architecture::Qwen2, ..small_model(architecture) }
}

/// A random model whose gates and logits are far from trivial.
fn model(architecture: Architecture, gate_heads: GateHeads) -> Decoder {
    let mut model = Decoder::random(&config(architecture), 7);
    model.add_gates(gate_heads);
    let mut rng = Rng::new(11);
    for param in model.params_mut() {
        let scale = if param.name.contains("gate.recency") { 2.0 } else { 0.3 };
        for x in param.value.f32_mut() {
            *x += scale * rng.normal();
        }
    }
    model
}

fn tokens(n: usize) -> Vec<u32> {
    let mut rng = Rng::new(23);
    (0..n).map(|_| rng.below(64) as u32).collect()
}

fn hidden(model: &Decoder, tokens: &[u32], lens: &[usize], plan: &AttentionPlan) -> Tensor {
    model.forward(&Tape::frozen(), tokens, lens, plan, Forward::default()).h.value().clone()
}

fn routing(window: usize, top_k: usize, route_every: usize) -> RoutingConfig {
    RoutingConfig { window, top_k, route_every, n_sink: 3, gate_heads: GateHeads::KvHead, gate_temperature: 0.0 }
}

#[test]
fn a_budget_beyond_the_text_is_dense_attention() {
    let model = model(Architecture::Llama, GateHeads::KvHead);
    let tokens = tokens(150);
    let dense = hidden(&model, &tokens, &[150], &AttentionPlan::dense());
    for policy in [Policy::Gate, Policy::Streaming, Policy::Random, Policy::H2o, Policy::Oracle] {
        for route_every in [1, 8, 64] {
            let routed = hidden(&model, &tokens, &[150], &AttentionPlan::new(policy, routing(4, 150, route_every)));
            let difference = max_abs_diff(routed.f32(), dense.f32());
            assert!(difference < 1e-4, "{policy:?} every {route_every}: {difference}");
        }
    }
}

#[test]
fn a_constant_gate_is_streaming() {
    let mut model = Decoder::random(&config(Architecture::Llama), 3);
    model.add_gates(GateHeads::KvHead);
    let tokens = tokens(120);
    for (window, top_k, route_every) in [(1, 8, 1), (8, 16, 8), (5, 12, 64)] {
        let routing = routing(window, top_k, route_every);
        let gate = hidden(&model, &tokens, &[120], &AttentionPlan::new(Policy::Gate, routing));
        let streaming = hidden(&model, &tokens, &[120], &AttentionPlan::new(Policy::Streaming, routing));
        assert_eq!(gate.f32(), streaming.f32());
    }
}

#[test]
fn decoding_equals_prefill_across_block_boundaries_and_chunkings() {
    for architecture in [Architecture::Llama, Architecture::Qwen2, Architecture::Qwen3] {
        for gate_heads in [GateHeads::KvHead, GateHeads::Shared] {
            let model = model(architecture, gate_heads);
            let tokens = tokens(150);
            for (window, top_k, route_every, temperature) in
                [(1, 8, 1, 0.0), (8, 16, 8, 0.0), (8, 0, 8, 0.0), (5, 12, 64, 0.0), (128, 4, 8, 0.0), (6, 10, 4, 0.8), (9, 200, 16, 0.0)]
            {
                for policy in [Policy::Gate, Policy::Streaming, Policy::Random, Policy::Dense] {
                    let routing = RoutingConfig { gate_temperature: temperature, ..routing(window, top_k, route_every) };
                    let plan = AttentionPlan::new(policy, routing);
                    let whole = hidden(&model, &tokens, &[150], &plan);
                    for chunk in [1, 7, 64, 150] {
                        let mut cache = Cache::new(&model.config, plan);
                        let mut pieces = Vec::new();
                        for part in tokens.chunks(chunk) {
                            pieces.extend_from_slice(model.forward_cached(part, &mut cache).f32());
                        }
                        let difference = max_abs_diff(&pieces, whole.f32());
                        assert!(difference < 1e-4, "{architecture:?} {policy:?} {routing:?} in chunks of {chunk}: {difference}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_cache_holds_no_more_keys_than_promised_and_never_grows() {
    let model = model(Architecture::Llama, GateHeads::KvHead);
    let routing = routing(8, 16, 4);
    let mut cache = Cache::new(&model.config, AttentionPlan::new(Policy::Gate, routing));
    let bytes = cache.bytes();
    // Keys and values, f32, 3 layers, 2 KV heads of 8.
    assert_eq!(bytes, 2 * 4 * 3 * 2 * 8 * routing.cached_keys());
    for &token in &tokens(200) {
        model.forward_cached(&[token], &mut cache);
        assert_eq!(cache.bytes(), bytes);
        let kept = cache.kept_positions(1, 0).unwrap();
        assert!(kept.len() <= routing.cached_keys());
        assert_eq!(*kept.last().unwrap() as usize, cache.position() - 1);
        let sinks = cache.position().min(3);
        assert!((0..sinks as u32).all(|sink| kept.contains(&sink)), "sinks are always kept");
    }
}

#[test]
fn what_was_evicted_never_returns() {
    let model = model(Architecture::Llama, GateHeads::KvHead);
    let mut cache = Cache::new(&model.config, AttentionPlan::new(Policy::Gate, routing(4, 8, 4)));
    let mut gone: std::collections::HashSet<u32> = std::collections::HashSet::new();
    let mut before: Vec<u32> = Vec::new();
    for &token in &tokens(160) {
        model.forward_cached(&[token], &mut cache);
        let now = cache.kept_positions(0, 1).unwrap();
        assert!(now.iter().all(|p| !gone.contains(p)));
        gone.extend(before.iter().filter(|p| !now.contains(p)));
        before = now;
    }
    assert!(gone.len() > 100, "the budget was never under pressure");
}

#[test]
fn sequences_of_a_ragged_batch_do_not_see_each_other() {
    let model = model(Architecture::Llama, GateHeads::KvHead);
    let (a, b) = (tokens(90), tokens(60).into_iter().rev().collect::<Vec<_>>());
    let mut batch = a.clone();
    batch.extend(&b);
    batch.extend(vec![0; 30]);
    for policy in Policy::ALL {
        let plan = AttentionPlan::new(policy, routing(5, 12, 8));
        let together = hidden(&model, &batch, &[90, 60], &plan);
        let alone_a = hidden(&model, &a, &[90], &plan);
        let alone_b = hidden(&model, &b, &[60], &plan);
        assert!(max_abs_diff(&together.f32()[..90 * 32], alone_a.f32()) < 1e-5, "{policy:?}");
        assert!(max_abs_diff(&together.f32()[90 * 32..150 * 32], alone_b.f32()) < 1e-5, "{policy:?}");
    }
}

/// Fact 6: knowing the future keeps more attention than a fixed rule, which keeps more than chance; here on the
/// error of the attention that the layer reads, since a random model has no loss to speak of.
#[test]
fn oracle_loses_less_than_random() {
    let model = model(Architecture::Llama, GateHeads::KvHead);
    let tokens = tokens(400);
    let dense = hidden(&model, &tokens, &[400], &AttentionPlan::dense());
    let error = |policy| {
        let routed = hidden(&model, &tokens, &[400], &AttentionPlan::new(policy, routing(8, 40, 8)));
        routed.f32().iter().zip(dense.f32()).map(|(a, b)| ((a - b) as f64).powi(2)).sum::<f64>()
    };
    let (oracle, random) = (error(Policy::Oracle), error(Policy::Random));
    assert!(oracle < 0.8 * random, "oracle {oracle}, random {random}");
}
