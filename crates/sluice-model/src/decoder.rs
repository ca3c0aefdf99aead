//! The decoder: embedding, layers, final norm and output head. Its parts are chosen by the config, so one
//! file serves llama, qwen2 and qwen3.

use std::collections::BTreeMap;
use std::sync::Arc;

use sluice_autograd::{Param, Tape, Var};
use sluice_kernels::gumbel::{mix, uniform};
use sluice_spec::{GateHeads, ModelConfig, RoutingConfig, tensor_names as names};
use sluice_tensor::{DType, Device, Tensor};

use crate::cache::Cache;
use crate::checkpoint::{Checkpoint, GateTensors, Gates};
use crate::layer::{Attention, Gate, Layer, LayerOutput, LayerShape, Linear, Mlp};
use crate::policy::AttentionPlan;
use sluice_spec::rope_frequencies::inverse_frequencies;

/// A decoder with its weights. Layers are shared so that checkpointed segments can hold on to them.
#[derive(Clone)]
pub struct Decoder {
    /// Sizes.
    pub config: ModelConfig,
    /// `[V, M]`.
    pub embed: Param,
    /// The layers, first to last.
    pub layers: Vec<Arc<Layer>>,
    /// `[M]`.
    pub final_norm: Param,
    /// `[V, M]`; absent when the embeddings are tied.
    pub lm_head: Option<Param>,
}

/// Options of a forward pass over whole sequences.
#[derive(Clone, Copy, Debug, Default)]
pub struct Forward {
    /// Layers, from the first on, of which only the input is kept; the rest of them is recomputed in backward.
    pub recompute: usize,
    /// Return the attention blocks' outputs and the gate scores of every layer.
    pub keep_layers: bool,
}

/// Result of a forward pass.
pub struct Hidden {
    /// Final hidden states after the last norm, `[B, T, M]`.
    pub h: Var,
    /// Per layer: the attention block's output and the gate scores (see [`Forward::keep_layers`]).
    pub layers: Vec<KeptLayer>,
}

/// What [`Forward::keep_layers`] keeps of a layer.
pub struct KeptLayer {
    /// Output of the attention block, `[B, T, M]`.
    pub block: Var,
    /// Gate scores `[B, T, G]`.
    pub scores: Option<Var>,
}

impl Decoder {
    /// Build from a loaded checkpoint, whose reader has checked that every tensor is there with its shape.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Self {
        let mut model = Self::assemble(&checkpoint.config, |name, shape| {
            let tensor = checkpoint.tensors.get(name).unwrap_or_else(|| panic!("the checkpoint was read without {name}"));
            assert_eq!(tensor.shape(), shape, "{name}");
            tensor.to_dtype(DType::F32)
        });
        if let Some(gates) = &checkpoint.gates {
            model.set_gates(gates);
        }
        model
    }

    /// Random weights for training from scratch: normal, std `1 / sqrt(inputs)`, so that queries meet keys with logits of
    /// order one whatever the width; output projections scaled down by `1 / sqrt(2 L)` (GPT-2), embeddings 0.04, norms one. Query and key biases,
    /// where a model has them, are standard normal: under the rotation each head begins with a preference of its own for
    /// certain distances.
    pub fn random(config: &ModelConfig, seed: u64) -> Self {
        let residual_scale = 1.0 / (2.0 * config.n_layers as f32).sqrt();
        let mut index = 0u64;
        Self::assemble(config, |name, shape| {
            index += 1;
            let n = shape.iter().product();
            if name.ends_with("norm.weight") {
                return Tensor::full(1.0, shape);
            }
            if name.ends_with("v_proj.bias") {
                return Tensor::zeros(shape);
            }
            if name.ends_with("bias") {
                return Tensor::from_vec((0..n).map(|i| normal(mix(seed, index), i as u64)).collect(), shape);
            }
            let residual = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
            let inputs = shape[shape.len() - 1] as f32;
            let std = if name == names::EMBED || name == names::LM_HEAD { 0.04 } else { inputs.sqrt().recip() };
            let std = std * if residual { residual_scale } else { 1.0 };
            Tensor::from_vec((0..n).map(|i| std * normal(mix(seed, index), i as u64)).collect(), shape)
        })
    }

    fn assemble(config: &ModelConfig, mut take: impl FnMut(&str, Vec<usize>) -> Tensor) -> Self {
        let (m, f, v, d) = (config.d_model, config.d_ff, config.vocab_size, config.head_dim);
        let (q, kv) = (config.n_heads * d, config.n_kv_heads * d);
        let shape = LayerShape {
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            head_dim: d,
            norm_eps: config.norm_eps,
            inv_freq: inverse_frequencies(config),
        };
        let mut param = |name: String, shape: Vec<usize>| Param { value: take(&name, shape), name, trainable: false };
        let embed = param(names::EMBED.into(), vec![v, m]);
        let mut layers = Vec::with_capacity(config.n_layers);
        for i in 0..config.n_layers {
            let mut of = |part: &str, shape: Vec<usize>| param(names::of_layer(i, part), shape);
            let mut projection = |name: &str, n: usize, k: usize, bias: bool| Linear {
                weight: of(&format!("{name}.weight"), vec![n, k]),
                bias: bias.then(|| of(&format!("{name}.bias"), vec![n])),
            };
            let q_proj = projection("self_attn.q_proj", q, m, config.qkv_bias);
            let k_proj = projection("self_attn.k_proj", kv, m, config.qkv_bias);
            let v_proj = projection("self_attn.v_proj", kv, m, config.qkv_bias);
            let o_proj = projection("self_attn.o_proj", m, q, false);
            let gate_proj = projection("mlp.gate_proj", f, m, false);
            let up_proj = projection("mlp.up_proj", f, m, false);
            let down_proj = projection("mlp.down_proj", m, f, false);
            let q_norm = config.qk_norm.then(|| of("self_attn.q_norm.weight", vec![d]));
            let k_norm = config.qk_norm.then(|| of("self_attn.k_norm.weight", vec![d]));
            layers.push(Arc::new(Layer {
                shape: shape.clone(),
                input_norm: of("input_layernorm.weight", vec![m]),
                attention: Attention { q_proj, k_proj, v_proj, o_proj, q_norm, k_norm },
                post_norm: of("post_attention_layernorm.weight", vec![m]),
                mlp: Mlp { gate_proj, up_proj, down_proj },
                gate: None,
            }));
        }
        let final_norm = param(names::FINAL_NORM.into(), vec![m]);
        let lm_head = (!config.tie_embeddings).then(|| param(names::LM_HEAD.into(), vec![v, m]));
        Self { config: config.clone(), embed, layers, final_norm, lm_head }
    }

    /// Gates that keep the most recent keys: zero weights and slope, which is exactly StreamingLLM.
    pub fn add_gates(&mut self, gate_heads: GateHeads) {
        let heads = match gate_heads {
            GateHeads::KvHead => self.config.n_kv_heads,
            GateHeads::Shared => 1,
        };
        let device = self.device();
        for (i, layer) in self.layers.iter_mut().enumerate() {
            let param = |name, shape: Vec<usize>| Param { name, value: Tensor::zeros_on(&device, shape), trainable: false };
            Arc::make_mut(layer).gate = Some(Gate {
                weight: param(names::gate_weight(i), vec![heads, self.config.d_model]),
                bias: param(names::gate_bias(i), vec![heads]),
                recency: param(names::gate_recency(i), vec![heads]),
            });
        }
    }

    /// Install loaded gates; their shapes were checked against this base model when they were read.
    pub fn set_gates(&mut self, gates: &Gates) {
        let device = self.device();
        for (i, (layer, tensors)) in self.layers.iter_mut().zip(&gates.layers).enumerate() {
            let param = |name, value: &Tensor| Param { name, value: value.to(&device), trainable: false };
            Arc::make_mut(layer).gate = Some(Gate {
                weight: param(names::gate_weight(i), &tensors.weight),
                bias: param(names::gate_bias(i), &tensors.bias),
                recency: param(names::gate_recency(i), &tensors.recency),
            });
        }
    }

    /// The gates as plain tensors in main memory, for a gate file; none unless every layer has one.
    pub fn gates(&self, routing: RoutingConfig, note: impl Into<String>) -> Option<Gates> {
        let layers = self.layers.iter().map(|layer| {
            let gate = layer.gate.as_ref()?;
            let [weight, bias, recency] = [&gate.weight, &gate.bias, &gate.recency].map(|param| param.value.to(&Device::Cpu));
            Some(GateTensors { weight, bias, recency })
        });
        Some(Gates { routing, layers: layers.collect::<Option<_>>()?, note: note.into() })
    }

    /// Whether every layer has a gate.
    pub fn has_gates(&self) -> bool {
        self.layers.iter().all(|layer| layer.gate.is_some())
    }

    /// Weights of the output head `[V, M]`.
    pub fn head(&self) -> &Param {
        self.lm_head.as_ref().unwrap_or(&self.embed)
    }

    /// Embeddings `[B, T, M]` of `tokens [B T]`.
    pub fn embed(&self, tape: &Tape, tokens: &[u32], batch: usize) -> Var {
        let h = tape.embedding(tokens, &tape.param(&self.embed)); // [B T, M]
        tape.reshape(&h, [batch, tokens.len() / batch, self.config.d_model])
    }

    /// Final hidden states of whole sequences from position 0; `lens [B]` valid tokens each.
    pub fn forward(&self, tape: &Tape, tokens: &[u32], lens: &[usize], plan: &AttentionPlan, options: Forward) -> Hidden {
        let h = self.embed(tape, tokens, lens.len());
        self.forward_embedded(tape, h, lens, plan, options)
    }

    /// The same from embeddings `[B, T, M]`, which adversarial training perturbs.
    pub fn forward_embedded(&self, tape: &Tape, embedded: Var, lens: &[usize], plan: &AttentionPlan, options: Forward) -> Hidden {
        let mut h = embedded; // [B, T, M]
        let mut kept = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let LayerOutput { h: next, block, scores } = if index < options.recompute {
                checkpointed_layer(tape, layer, &h, lens, index, plan)
            } else {
                layer.forward(tape, &h, lens, index, plan)
            };
            h = next;
            if options.keep_layers {
                kept.push(KeptLayer { block, scores });
            }
        }
        let h = tape.rms_norm(&h, Some(&tape.param(&self.final_norm)), self.config.norm_eps);
        Hidden { h, layers: kept }
    }

    /// Continue one sequence by `tokens [T]` (a prompt chunk or a single token) with its cache.
    /// Returns the final hidden states `[1, T, M]`.
    pub fn forward_cached(&self, tokens: &[u32], cache: &mut Cache) -> Tensor {
        let tape = Tape::frozen();
        let mut h = self.embed(&tape, tokens, 1); // [1, T, M]
        let start = cache.position();
        let positions: Vec<u32> = (start as u32..(start + tokens.len()) as u32).collect();
        for (index, layer) in self.layers.iter().enumerate() {
            let p = layer.project(&tape, &h, &positions);
            let o = cache.attend(&tape, layer, index, &p, &positions); // [1, T, H, D]
            let block = layer.block_output(&tape, &tape.constant(o));
            h = layer.finish(&tape, &h, &block);
        }
        cache.advance(tokens.len());
        tape.rms_norm(&h, Some(&tape.param(&self.final_norm)), self.config.norm_eps).value().clone()
    }

    /// Logits `[n, V]` of hidden states `[n, M]`; for few rows, losses are fused with the projection.
    pub fn logits(&self, h: &Tensor) -> Tensor {
        sluice_kernels::output_head::logits(h, &self.head().value)
    }

    /// The same model with its weights on a device.
    pub fn to(mut self, device: &Device) -> Self {
        for param in self.params_mut() {
            param.value = param.value.to(device);
        }
        self
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.embed.value.device()
    }

    /// Every parameter.
    pub fn params(&self) -> Vec<&Param> {
        let mut params = vec![&self.embed];
        params.extend(self.layers.iter().flat_map(|layer| layer.params()));
        params.push(&self.final_norm);
        params.extend(&self.lm_head);
        params
    }

    /// Every parameter for writing, in the same order.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        let mut params = vec![&mut self.embed];
        params.extend(self.layers.iter_mut().flat_map(|layer| Arc::make_mut(layer).params_mut()));
        params.push(&mut self.final_norm);
        params.extend(&mut self.lm_head);
        params
    }

    /// Choose by name which parameters learn.
    pub fn set_trainable(&mut self, learns: impl Fn(&str) -> bool) {
        for param in self.params_mut() {
            param.trainable = learns(&param.name);
        }
    }

    /// Base weights by their Hugging Face names, in main memory, gates left out.
    pub fn base_tensors(&self) -> BTreeMap<String, Tensor> {
        self.params().into_iter().filter(|p| !is_gate(&p.name)).map(|p| (p.name.clone(), p.value.to(&Device::Cpu))).collect()
    }
}

/// Whether a parameter name belongs to a gate.
pub fn is_gate(name: &str) -> bool {
    name.starts_with("sluice.")
}

fn checkpointed_layer(tape: &Tape, layer: &Arc<Layer>, h: &Var, lens: &[usize], index: usize, plan: &AttentionPlan) -> LayerOutput {
    let (layer, lens, plan) = (Arc::clone(layer), lens.to_vec(), *plan);
    let outputs = tape.checkpoint(&[h], move |tape, inputs| {
        let out = layer.forward(tape, &inputs[0], &lens, index, &plan);
        let mut outputs = vec![out.h, out.block];
        outputs.extend(out.scores);
        outputs
    });
    let mut outputs = outputs.into_iter();
    let (h, block) = (outputs.next().expect("residual stream"), outputs.next().expect("block output"));
    LayerOutput { h, block, scores: outputs.next() }
}

fn normal(seed: u64, i: u64) -> f32 {
    let bits = mix(seed, i);
    let u = 1.0 - uniform(bits);
    let angle = std::f32::consts::TAU * uniform(mix(bits, 1));
    (-2.0 * u.ln()).sqrt() * angle.cos()
}
