//! A training step recorded with PyTorch (golden/golden_step.py): logits, loss, every gradient by name, routing, and
//! ten AdamW losses must come out the same here.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors};
use sluice_autograd::Tape;
use sluice_kernels::adamw::{self, AdamW};
use sluice_kernels::top_k_routing;
use sluice_model::checkpoint::{Checkpoint, GateTensors, Gates};
use sluice_model::{AttentionPlan, Decoder, Forward, Policy, policy};
use sluice_spec::{ModelConfig, RoutingConfig, TextConfig, TokenizerSource, tensor_names};
use sluice_tensor::Tensor;
use sluice_testkit::{assert_close, max_abs_diff};

struct Golden {
    config: ModelConfig,
    routing: RoutingConfig,
    tensors: BTreeMap<String, Tensor>,
    integers: BTreeMap<String, Vec<i64>>,
}

fn golden(name: &str) -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(name);
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let text = |key: &str| metadata.metadata().as_ref().unwrap()[key].clone();
    let (mut tensors, mut integers) = (BTreeMap::new(), BTreeMap::new());
    for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let words = view.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
        match view.dtype() {
            Dtype::F32 => drop(tensors.insert(name, Tensor::from_vec(words.map(f32::from_le_bytes).collect(), view.shape()))),
            Dtype::I32 => drop(integers.insert(name, words.map(|w| i32::from_le_bytes(w) as i64).collect())),
            Dtype::U32 => drop(integers.insert(name, words.map(|w| u32::from_le_bytes(w) as i64).collect())),
            other => panic!("{name} has format {other:?}"),
        }
    }
    Golden {
        config: serde_json::from_str(&text("config")).unwrap(),
        routing: serde_json::from_str(&text("routing")).unwrap(),
        tensors,
        integers,
    }
}

impl Golden {
    fn model(&self) -> Decoder {
        let weight = |name: &str| self.tensors[&format!("weights.{name}")].clone();
        let layers = (0..self.config.n_layers).map(|i| GateTensors {
            weight: weight(&tensor_names::gate_weight(i)),
            bias: weight(&tensor_names::gate_bias(i)),
            recency: weight(&tensor_names::gate_recency(i)),
        });
        let gates = Gates { routing: self.routing, layers: layers.collect(), note: String::new() };
        let base = self.tensors.iter().filter_map(|(name, t)| Some((name.strip_prefix("weights.")?.to_string(), t.clone())));
        let checkpoint = Checkpoint {
            path: "golden".into(),
            config: self.config.clone(),
            tensors: base.filter(|(name, _)| !name.starts_with("sluice.")).collect(),
            tokenizer: TokenizerSource::Missing,
            text: TextConfig::default(),
            gates: Some(gates),
        };
        let mut model = Decoder::from_checkpoint(&checkpoint);
        model.set_trainable(|_| true);
        model
    }
}

struct Step {
    loss: f32,
    nll: Vec<f32>,
    hidden: Tensor,
    grads: BTreeMap<String, Tensor>,
}

fn step(golden: &Golden, model: &Decoder, checkpoint: bool) -> Step {
    let tokens: Vec<u32> = golden.integers["tokens"].iter().map(|&t| t as u32).collect();
    let lens: Vec<usize> = golden.integers["lens"].iter().map(|&n| n as usize).collect();
    let t = tokens.len() / lens.len();
    let plan = AttentionPlan::new(Policy::Gate, golden.routing);
    let tape = Tape::recording();
    let h = model
        .forward(&tape, &tokens, &lens, &plan, Forward { recompute: if checkpoint { model.layers.len() } else { 0 }, keep_layers: false })
        .h;
    let scored = |i: usize| i % t + 1 < lens[i / t];
    let n = (0..tokens.len()).filter(|&i| scored(i)).count() as f32;
    let weights: Vec<f32> = (0..tokens.len()).map(|i| if scored(i) { 1.0 / n } else { 0.0 }).collect();
    let targets: Vec<u32> = (0..tokens.len()).map(|i| if scored(i) { tokens[i + 1] } else { 0 }).collect();
    let flat = tape.reshape(&h, [tokens.len(), model.config.d_model]);
    let (loss, parts) = tape.cross_entropy(&flat, &tape.param(model.head()), &targets, &weights);
    let nll = parts.into_cross_entropy().nll;
    Step { loss: loss.value().item(), nll, hidden: flat.value().clone(), grads: tape.backward_scalar(&loss).into_params() }
}

fn check(name: &str) {
    let golden = golden(name);
    let mut model = golden.model();
    let lens = &golden.integers["lens"];
    let t = golden.integers["tokens"].len() / lens.len();

    let first = step(&golden, &model, false);
    assert_close("loss", &[first.loss], golden.tensors["loss"].f32(), 1e-5);
    let logits = model.logits(&first.hidden);
    let v = golden.config.vocab_size;
    for (b, &len) in lens.iter().enumerate() {
        let rows = b * t * v..(b * t + len as usize) * v;
        assert_close("logits", &logits.f32()[rows.clone()], &golden.tensors["logits"].f32()[rows], 2e-5);
        let recorded = &golden.tensors["nll"].f32()[b * (t - 1)..(b + 1) * (t - 1)];
        assert_close("nll", &first.nll[b * t..b * t + len as usize - 1], &recorded[..len as usize - 1], 2e-5);
    }

    let mut checked = 0;
    for (name, want) in golden.tensors.iter().filter_map(|(n, t)| Some((n.strip_prefix("grads.")?, t))) {
        let got = first.grads.get(name).unwrap_or_else(|| panic!("no gradient for {name}"));
        assert_eq!(got.shape(), want.shape(), "{name}");
        let scale = want.f32().iter().fold(1e-6f32, |m, g| m.max(g.abs()));
        let difference = max_abs_diff(got.f32(), want.f32());
        assert!(difference <= 1e-4 * scale, "gradient of {name} differs by {difference}, largest entry {scale}");
        checked += 1;
    }
    assert_eq!(checked, model.params().len(), "every parameter has a recorded gradient");

    let again = step(&golden, &model, true);
    assert_eq!(again.loss, first.loss, "recomputation changes nothing");
    for (name, grad) in &first.grads {
        assert_eq!(grad.f32(), again.grads[name].f32(), "recomputation changes the gradient of {name}");
    }

    let mut moments: BTreeMap<String, (Tensor, Tensor)> = BTreeMap::new();
    let mut losses = Vec::new();
    for i in 1..=10 {
        let Step { loss, grads, .. } = step(&golden, &model, false);
        losses.push(loss);
        for param in model.params_mut() {
            let zeros = || Tensor::zeros(param.value.shape());
            let (m, v) = moments.entry(param.name.clone()).or_insert_with(|| (zeros(), zeros()));
            let settings = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.01, step: i };
            adamw::step(&mut param.value, &grads[&param.name], m, v, &Tensor::scalar(1.0), settings);
        }
    }
    assert_close("ten AdamW losses", &losses, golden.tensors["adamw_losses"].f32(), 2e-4);
}

/// The routing of the first layer, whose input does not depend on any earlier rounding.
fn check_routing(name: &str) {
    let golden = golden(name);
    let model = golden.model();
    let tokens: Vec<u32> = golden.integers["tokens"].iter().map(|&t| t as u32).collect();
    let lens: Vec<usize> = golden.integers["lens"].iter().map(|&n| n as usize).collect();
    let t = tokens.len() / lens.len();
    let tape = Tape::frozen();
    let h = model.embed(&tape, &tokens, lens.len());
    let positions: Vec<u32> = (0..t as u32).collect();
    let layer = &model.layers[0];
    let p = layer.project(&tape, &h, &positions);
    let routing = top_k_routing::route(layer.score(&tape, &p.x, &positions).value(), &lens, &policy::budget(&golden.routing));
    let recorded = &golden.integers["layers.0.routing"];
    let width = routing.n_kv_heads * routing.n_routed;
    for (b, &len) in lens.iter().enumerate() {
        for block in 0..len.div_ceil(golden.routing.route_every) {
            let at = (b * routing.n_blocks + block) * width;
            let got: Vec<i64> = routing.indices[at..at + width].iter().map(|&i| i as i64).collect();
            assert_eq!(got, recorded[at..at + width], "sequence {b}, block {block}");
        }
    }
}

#[test]
fn llama_step_equals_pytorch() {
    check("golden_step.safetensors");
    check_routing("golden_step.safetensors");
}

#[test]
fn qwen2_step_equals_pytorch() {
    check("golden_step_qwen2.safetensors");
    check_routing("golden_step_qwen2.safetensors");
}

#[test]
fn qwen3_step_with_a_shared_gate_equals_pytorch() {
    check("golden_step_qwen3.safetensors");
    check_routing("golden_step_qwen3.safetensors");
}
