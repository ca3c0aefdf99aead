//! The encoder of the BERT family: embeddings, bidirectional layers with a norm behind each block, one vector per text.
//! For inference: works on tensors, without a tape.

use sluice_autograd::Param;
use sluice_kernels::dense_attention::Lens;
use sluice_kernels::routed_attention::{self, PlacedRouting};
use sluice_kernels::top_k_routing::{self, Budget};
use sluice_kernels::{dense_attention, embedding, gelu_mlp, layer_norm, linear, mean_pool};
use sluice_spec::EncoderConfig;
use sluice_spec::tensor_names::bert as names;
use sluice_tensor::{DType, Device, Tensor};

use crate::checkpoint::EncoderCheckpoint;
use crate::layer::Linear;

/// Weight and bias of a layer norm, `[M]` each.
#[derive(Clone)]
pub struct LayerNorm {
    /// `[M]`.
    pub weight: Param,
    /// `[M]`.
    pub bias: Param,
}

/// One layer: attention, then the MLP, each with a residual connection and the norm behind it.
#[derive(Clone)]
pub struct EncoderLayer {
    /// Queries, keys and values in one product, `[3 M, M]`.
    pub qkv: Linear,
    /// `[M, M]`.
    pub out: Linear,
    /// Behind the attention.
    pub attention_norm: LayerNorm,
    /// `[F, M]`.
    pub up: Linear,
    /// `[M, F]`.
    pub down: Linear,
    /// Behind the MLP.
    pub output_norm: LayerNorm,
}

/// An encoder with its weights.
#[derive(Clone)]
pub struct Encoder {
    /// Sizes.
    pub config: EncoderConfig,
    /// `[V, M]`.
    pub words: Param,
    /// `[max_seq_len, M]`.
    pub positions: Param,
    /// `[n_types, M]`.
    pub types: Param,
    /// Behind the embeddings.
    pub norm: LayerNorm,
    /// The layers, first to last.
    pub layers: Vec<EncoderLayer>,
}

/// Token ids of several texts, padded to the longest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextBatch {
    /// `[B, T]`; padding is 0.
    pub tokens: Vec<u32>,
    /// Tokens of every text.
    pub lens: Vec<usize>,
}

impl TextBatch {
    /// Pad texts to the longest of them.
    pub fn of(texts: &[&[u32]]) -> Self {
        let t = texts.iter().map(|text| text.len()).max().unwrap_or(0);
        let mut tokens = vec![0; texts.len() * t];
        for (row, text) in tokens.chunks_mut(t.max(1)).zip(texts) {
            row[..text.len()].copy_from_slice(text);
        }
        Self { tokens, lens: texts.iter().map(|text| text.len()).collect() }
    }

    fn width(&self) -> usize {
        self.tokens.len().checked_div(self.lens.len()).unwrap_or(0)
    }
}

/// Which keys a query of an encoder sees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum EncoderAttention {
    /// Every token of its text.
    Dense,
    /// The `window` positions centred on it, and the `top_k` tokens of its text with the largest scores. There are no trained gates for encoders, so
    /// all scores are equal, which keeps the first `n_sink` and the last tokens: for speed, not for meaning.
    Routed(Budget),
}

/// The same for a batch, on the device of the layers: one for all of them.
enum Seen {
    Dense(Lens),
    Routed(PlacedRouting),
}

impl Encoder {
    /// Build from a loaded checkpoint, whose reader has checked that every tensor is there with its shape.
    pub fn from_checkpoint(checkpoint: &EncoderCheckpoint) -> Self {
        Self::assemble(&checkpoint.config, |name, shape| {
            let tensor = checkpoint.tensors.get(name).unwrap_or_else(|| panic!("the checkpoint was read without {name}"));
            assert_eq!(tensor.shape(), shape, "{name}");
            tensor.to_dtype(DType::F32)
        })
    }

    /// Weights that `take(name, shape)` gives, in main memory.
    pub fn assemble(config: &EncoderConfig, mut take: impl FnMut(&str, &[usize]) -> Tensor) -> Self {
        let (m, f) = (config.d_model, config.d_ff);
        let mut param = |name: String, shape: &[usize]| Param { value: take(&name, shape), name, trainable: false };
        let three = |layer: usize, kind: &str, parts: [Param; 3]| Param {
            value: stacked(&parts.map(|part| part.value)),
            name: names::of_layer(layer, &format!("attention.self.qkv.{kind}")),
            trainable: false,
        };
        let words = param(names::WORDS.into(), &[config.vocab_size, m]);
        let positions = param(names::POSITIONS.into(), &[config.max_seq_len, m]);
        let types = param(names::TYPES.into(), &[config.n_types, m]);
        let mut norm =
            |name: String| LayerNorm { weight: param(format!("{name}.weight"), &[m]), bias: param(format!("{name}.bias"), &[m]) };
        let embedding_norm = norm(names::NORM.into());
        let layers = (0..config.n_layers).map(|i| {
            let of = |part: &str| names::of_layer(i, part);
            let mut norm = |part: &str| LayerNorm {
                weight: param(of(&format!("{part}.weight")), &[m]),
                bias: param(of(&format!("{part}.bias")), &[m]),
            };
            let (attention_norm, output_norm) = (norm("attention.output.LayerNorm"), norm("output.LayerNorm"));
            let self_attention = ["query", "key", "value"].map(|part| {
                let name = format!("attention.self.{part}");
                (param(of(&format!("{name}.weight")), &[m, m]), param(of(&format!("{name}.bias")), &[m]))
            });
            let [(qw, qb), (kw, kb), (vw, vb)] = self_attention;
            let qkv = Linear { weight: three(i, "weight", [qw, kw, vw]), bias: Some(three(i, "bias", [qb, kb, vb])) };
            let mut linear = |part: &str, n: usize, k: usize| Linear {
                weight: param(of(&format!("{part}.weight")), &[n, k]),
                bias: Some(param(of(&format!("{part}.bias")), &[n])),
            };
            EncoderLayer {
                qkv,
                out: linear("attention.output.dense", m, m),
                attention_norm,
                up: linear("intermediate.dense", f, m),
                down: linear("output.dense", m, f),
                output_norm,
            }
        });
        let layers = layers.collect();
        Self { config: config.clone(), words, positions, types, norm: embedding_norm, layers }
    }

    /// Final hidden states `[B, T, M]`, all tokens in segments of type 0; rows of padding are not defined. On a GPU in the format that its precision gives to
    /// activations. Panics for a text longer than the model has positions.
    #[track_caller]
    pub fn forward(&self, batch: &TextBatch, attention: EncoderAttention) -> Tensor {
        let mut h = self.embed(batch); // [B, T, M]
        let seen = match attention {
            EncoderAttention::Dense => Seen::Dense(Lens::new(&batch.lens, &self.device())),
            EncoderAttention::Routed(budget) => {
                let scores = Tensor::zeros_on(&self.device(), [batch.lens.len(), batch.width(), self.config.n_heads]); // [B, T, H]
                Seen::Routed(top_k_routing::route_bidirectional_in_place(&scores, &batch.lens, &budget))
            }
        };
        for layer in &self.layers {
            h = layer.forward(&h, &seen, &self.config);
        }
        h
    }

    /// Mean of the final states of every text, `[B, M]` in f32 where the weights are.
    #[track_caller]
    pub fn mean_states(&self, batch: &TextBatch) -> Tensor {
        mean_pool::fwd(&self.forward(batch, EncoderAttention::Dense), &batch.lens)
    }

    fn embed(&self, batch: &TextBatch) -> Tensor {
        let (b, t, m) = (batch.lens.len(), batch.width(), self.config.d_model);
        assert!(t <= self.config.max_seq_len, "a text of {t} tokens, but the encoder has {} positions", self.config.max_seq_len);
        let positions: Vec<u32> = (0..b).flat_map(|_| 0..t as u32).collect();
        let types = vec![0; b * t];
        let sum = embedding::fwd_sum([&batch.tokens, &positions, &types], [&self.words.value, &self.positions.value, &self.types.value]);
        let (h, ..) = layer_norm::fwd(&sum, &self.norm.weight.value, &self.norm.bias.value, self.config.norm_eps);
        let format = h.gpu().map_or(DType::F32, |gpu| gpu.precision().activations());
        h.to_dtype(format).reshape([b, t, m])
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
        self.words.value.device()
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        let mut params = vec![&mut self.words, &mut self.positions, &mut self.types, &mut self.norm.weight, &mut self.norm.bias];
        for layer in &mut self.layers {
            for linear in [&mut layer.qkv, &mut layer.out, &mut layer.up, &mut layer.down] {
                params.push(&mut linear.weight);
                params.extend(&mut linear.bias);
            }
            for norm in [&mut layer.attention_norm, &mut layer.output_norm] {
                params.extend([&mut norm.weight, &mut norm.bias]);
            }
        }
        params
    }
}

impl EncoderLayer {
    fn forward(&self, h: &Tensor, seen: &Seen, config: &EncoderConfig) -> Tensor {
        let [b, t, m] = h.dims();
        let qkv = linear::fwd_narrow_bias(h, &self.qkv.weight.value, bias(&self.qkv)).reshape([b, t, 3, config.n_heads, config.head_dim()]);
        // [B, T, H, D]
        let o = match seen {
            Seen::Dense(lens) => dense_attention::fwd_packed(&qkv, lens),
            Seen::Routed(routing) => routed_attention::fwd_packed(&qkv, routing),
        };
        let block = linear::fwd(&o.reshape([b, t, m]), &self.out.weight.value, None); // [B, T, M]
        let h = self.attention_norm.of_sum(&block, bias(&self.out), h, config.norm_eps);
        let block = gelu_mlp::fwd(&h, &self.up.weight.value, bias(&self.up), &self.down.weight.value); // [B, T, M]
        self.output_norm.of_sum(&block, bias(&self.down), &h, config.norm_eps)
    }
}

impl LayerNorm {
    fn of_sum(&self, block: &Tensor, bias: &Tensor, h: &Tensor, eps: f32) -> Tensor {
        layer_norm::fwd_residual(block, bias, h, &self.weight.value, &self.bias.value, eps)
    }
}

/// The rows of tensors in main memory one below the other.
fn stacked(parts: &[Tensor]) -> Tensor {
    let mut shape = parts[0].shape().to_vec();
    shape[0] *= parts.len();
    Tensor::from_vec(parts.iter().flat_map(|part| part.f32()).copied().collect(), shape)
}

fn bias(linear: &Linear) -> &Tensor {
    &linear.bias.as_ref().expect("an encoder has biases everywhere").value
}
