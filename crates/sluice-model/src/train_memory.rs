//! What a training step holds in memory, counted from shapes alone: weights, moments, gradients, and the activations that each layer
//! keeps for its backward pass, where any number of layers, the first ones, may be run again instead. From that, trainers choose
//! how many do for a step to fit a budget. `sluice bench train-step` prints the count beside what it measured.
//!
//! The first layers are the ones to run again: the backward pass reaches them last, when the others' activations are gone, so that the
//! one layer that is whole again never comes on top of everything else.
//!
//! Small things that a step also allocates (positions, sums over rows, sums of key gradients in attention) are left out, so the
//! measured peak is a little higher.

use serde::{Deserialize, Serialize};
use sluice_kernels::top_k_routing::Budget;
use sluice_kernels::{output_head, routed_attention};
use sluice_spec::{ModelConfig, RoutingConfig};
use sluice_tensor::{DType, Device};

/// What a step runs on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepShape {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each, padding included.
    pub context: usize,
    /// Layers, from the first on, that keep their input alone and run again in the backward pass.
    pub recompute: usize,
    /// Whether a GPU computes, which holds more logits at a time.
    pub gpu: bool,
    /// Format of activations; with bf16, weights are kept in it as well, beside their masters.
    pub activations: DType,
    /// Routing of the attention with the keys of its overhang in `top_k`, or dense attention.
    pub routing: Option<RoutingConfig>,
}

impl StepShape {
    /// Dense attention of `batch` sequences of `context` tokens on a device, with `recompute` layers that run again.
    pub fn on(device: &Device, batch: usize, context: usize, recompute: usize) -> Self {
        let activations = device.gpu().map_or(DType::F32, |gpu| gpu.precision().activations());
        Self { batch, context, recompute, gpu: device.gpu().is_some(), activations, routing: None }
    }
}

/// Counted memory of one training step on `batch` sequences of `context` tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainMemory {
    /// Tokens of a sequence.
    pub context: usize,
    /// Sequences.
    pub batch: usize,
    /// Layers, from the first on, that run again in the backward pass.
    pub recompute: usize,
    /// Weights.
    pub parameter_bytes: u64,
    /// Both moments of AdamW.
    pub moment_bytes: u64,
    /// Gradients of all weights, as they are at the end of the backward pass.
    pub gradient_bytes: u64,
    /// Activations of one layer that its backward pass reads, by op.
    pub layer: Vec<SavedBytes>,
    /// Activations kept at the end of the forward pass, all layers.
    pub saved_bytes: u64,
    /// Logits that the output head holds at a time.
    pub head_chunk_bytes: u64,
    /// Most that is held at any moment of the step.
    pub peak_bytes: u64,
}

/// What the backward pass of one op reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedBytes {
    /// The op.
    pub op: String,
    /// Bytes that no earlier op of the layer has kept already.
    pub bytes: u64,
}

/// Bytes of an f32.
const ELEMENT: u64 = 4;

/// A dense step in f32 in which every weight learns.
pub fn dense(config: &ModelConfig, batch: usize, context: usize, recompute: usize) -> TrainMemory {
    step(config, &StepShape::on(&Device::Cpu, batch, context, recompute))
}

/// A step in which every weight learns.
pub fn step(config: &ModelConfig, shape: &StepShape) -> TrainMemory {
    let sizes = Sizes::new(config, shape);
    let Sizes { tokens, a, m, f, n_layers, recompute, .. } = sizes;
    let saved = sizes.saved_by_learning_weights();
    let per_layer: u64 = saved.iter().map(|(_, bytes)| bytes).sum();
    // A segment keeps its input, which is f32.
    let kept = |layers: u64| layers.min(recompute) * ELEMENT * m + layers.saturating_sub(recompute) * per_layer;
    let (weights, embedding) = (sizes.weights, sizes.embedding);
    let head_chunk = sizes.head_chunk_bytes(1);

    // The fullest moment is one of these; weights and moments, alive all the time, are added at the end.
    // In the output head: the last residual stream, kept by the final norm, its result, the gradient of that, and of the head.
    let in_head = tokens * (kept(n_layers) + ELEMENT * (m + 1) + 2 * a * m) + ELEMENT * embedding + head_chunk;
    // In SwiGLU on the way back, layer by layer: activations go and gradients come. The down projection has done its part; alive
    // are the gradients of the residual stream and of SwiGLU's output and inputs. The final norm's result lives as long as the step.
    let in_layer = (0..n_layers).map(|below| {
        let gradients = embedding + m + (n_layers - 1 - below) * sizes.weights_of_layer + m * f;
        // A segment runs again as a whole; its input is among what the tape around it keeps.
        let replayed = if below < recompute { per_layer - ELEMENT * m } else { 0 };
        let alive = kept(below + 1) + replayed - a * f;
        ELEMENT * gradients + tokens * (alive + ELEMENT * m + a * m + 3 * a * f)
    });
    // In attention on a GPU, where sums of key gradients may outweigh what SwiGLU needs.
    let in_attention = (0..n_layers).map(|below| {
        let gradients = embedding + m + (n_layers - 1 - below) * sizes.weights_of_layer + 3 * m * f + m;
        let replayed = if below < recompute { per_layer - ELEMENT * m } else { 0 };
        ELEMENT * gradients + sizes.attention_scratch + tokens * (kept(below + 1) + replayed + sizes.beside_attention())
    });
    // At the end: every gradient, and that of the embedded tokens.
    let at_end = ELEMENT * weights + tokens * 2 * ELEMENT * m;
    let fullest = in_layer.chain(in_attention).chain([in_head, at_end]).max().expect("a chain of at least two");
    TrainMemory {
        context: shape.context,
        batch: shape.batch,
        recompute: shape.recompute,
        parameter_bytes: ELEMENT * weights,
        moment_bytes: 2 * ELEMENT * weights,
        gradient_bytes: ELEMENT * weights,
        layer: saved
            .iter()
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(op, bytes)| SavedBytes { op: (*op).into(), bytes: tokens * bytes })
            .collect(),
        saved_bytes: tokens * kept(n_layers),
        head_chunk_bytes: head_chunk,
        peak_bytes: 3 * ELEMENT * weights + sizes.narrow_weights() + fullest,
    }
}

/// Most that is held at any moment of a distillation step through the stack: the teacher's pass, then the student's with logits, features
/// and gate losses. `base_learns`: all weights do, or else the gates alone. `sums`: gradients of several batches are added up. `teacher`: a second model that gives
/// the logits.
pub fn distillation(config: &ModelConfig, shape: &StepShape, base_learns: bool, sums: bool, teacher: Option<&ModelConfig>) -> u64 {
    let sizes = Sizes::new(config, shape);
    let Sizes { tokens, a, m, f, g, n_layers, recompute, .. } = sizes;
    let second = teacher.map_or(0, |config| {
        let teacher = Sizes::new(config, shape);
        ELEMENT * teacher.weights + teacher.narrow_weights() + tokens * a * teacher.m
    });
    // Outputs of the attention blocks, the teacher's and the student's, the student's scores, and what a relative error divides by.
    let compared = n_layers * (2 * a * m + ELEMENT * (g + 1));
    let always = second + tokens * (compared + a * m);
    // Losses come last, so the backward pass begins with their gradients of the blocks and scores of all layers.
    let of_losses = |layers: u64| layers * (a * m + ELEMENT * g);
    let head_chunks = sizes.head_chunk_bytes(2);
    // What the last tokens alone predict is computed beside the student's activations, in a pass that keeps one layer.
    let beside = |kept: u64| tokens * (kept + ELEMENT * (m + 1) + a * m + sizes.layer_in_flight());
    if base_learns {
        let per_layer: u64 = sizes.saved_by_learning_weights().iter().map(|(_, bytes)| bytes).sum();
        let kept = recompute * ELEMENT * m + (n_layers - recompute) * per_layer;
        let in_step = step(config, shape).peak_bytes + tokens * of_losses(n_layers);
        let in_pass = 3 * ELEMENT * sizes.weights + sizes.narrow_weights() + beside(kept);
        let sums = if sums { ELEMENT * sizes.weights } else { 0 };
        // The original is another model as soon as the student has moved.
        return always + sums + ELEMENT * sizes.weights + sizes.narrow_weights() + in_step.max(in_pass);
    }
    let per_layer: u64 = sizes.saved_by_frozen_weights();
    let kept = |layers: u64| layers.min(recompute) * ELEMENT * m + layers.saturating_sub(recompute) * per_layer;
    let in_head = tokens * (kept(n_layers) + ELEMENT * (m + 1) + 2 * a * m) + head_chunks;
    let in_layer = (0..n_layers).map(|below| {
        let replayed = if below < recompute { per_layer - ELEMENT * m + a * m } else { 0 };
        tokens * (kept(below + 1) + replayed + of_losses(below + 1) + ELEMENT * m + a * m + 3 * a * f)
    });
    let in_attention = (0..n_layers).map(|below| {
        let replayed = if below < recompute { per_layer - ELEMENT * m + a * m } else { 0 };
        sizes.attention_scratch + tokens * (kept(below + 1) + replayed + of_losses(below + 1) + sizes.beside_attention())
    });
    let fullest = in_layer.chain(in_attention).chain([in_head, beside(kept(n_layers))]).max().expect("a chain of at least two");
    always + ELEMENT * sizes.weights + sizes.narrow_weights() + fullest
}

/// What a step needs that is counted to hold `peak` bytes: a sixteenth more, for what the count leaves out.
pub fn with_margin(peak: u64) -> u64 {
    peak + peak / 16
}

/// Sizes of a model and a step.
struct Sizes {
    tokens: u64,
    vocab: usize,
    /// Bytes of an activation.
    a: u64,
    m: u64,
    f: u64,
    h: u64,
    g: u64,
    /// Elements of the queries and keys of a token.
    q: u64,
    kv: u64,
    n_layers: u64,
    recompute: u64,
    qk_norm: bool,
    weights: u64,
    weights_of_layer: u64,
    embedding: u64,
    narrow: bool,
    gpu: bool,
    /// Bytes that routing keeps of a token: marked scores, and its share of the indices of its block.
    routing: u64,
    /// Bytes of the sums that the gradients of routed keys take on a GPU.
    attention_scratch: u64,
}

impl Sizes {
    fn new(config: &ModelConfig, shape: &StepShape) -> Self {
        let (m, f, h, g) = (config.d_model as u64, config.d_ff as u64, config.n_heads as u64, config.n_kv_heads as u64);
        let (q, kv) = (h * config.head_dim as u64, g * config.head_dim as u64);
        let weights_of_layer = m * (2 * q + 2 * kv + 3 * f + 2) + biases_of_layer(config);
        let embedding = config.vocab_size as u64 * m;
        let head = if config.tie_embeddings { 0 } else { embedding };
        let n_layers = config.n_layers as u64;
        let budget = shape.routing.filter(|_| shape.gpu).map(|r| Budget {
            window: r.window,
            top_k: r.top_k,
            route_every: r.route_every,
            n_sink: r.n_sink,
        });
        let keys = [shape.batch, shape.context, config.n_kv_heads, config.head_dim];
        Self {
            tokens: (shape.batch * shape.context) as u64,
            vocab: config.vocab_size,
            a: shape.activations.size() as u64,
            m,
            f,
            h,
            g,
            q,
            kv,
            n_layers,
            recompute: (shape.recompute as u64).min(n_layers),
            qk_norm: config.qk_norm,
            weights: embedding + head + n_layers * weights_of_layer + m,
            weights_of_layer,
            embedding,
            narrow: shape.activations != DType::F32,
            gpu: shape.gpu,
            // In main memory a routing is no tensor.
            routing: budget.map_or(shape.routing.map_or(0, |_| ELEMENT * g), |budget| {
                ELEMENT * g * (1 + (budget.n_routed(shape.context) as u64).div_ceil(budget.route_every as u64))
            }),
            attention_scratch: budget.map_or(0, |budget| routed_attention::gpu_scratch_bytes(keys, &budget) as u64),
        }
    }

    /// Bytes per token that the ops of a layer keep when all weights learn, in the order of the forward pass. A linear layer keeps its
    /// input, unless somebody has it already. The residual stream, norms' and softmaxes' sums are f32.
    fn saved_by_learning_weights(&self) -> [(&'static str, u64); 8] {
        let &Self { a, m, f, h, q, kv, routing, .. } = self;
        [
            ("input norm", ELEMENT * (m + 1)),
            ("q, k and v projections", a * m),
            ("head norms", self.head_norms()),
            ("attention", a * (2 * q + 2 * kv) + ELEMENT * h + routing),
            ("MLP norm", ELEMENT * (m + 1)),
            ("gate and up projections", a * m),
            ("SwiGLU", a * 2 * f),
            ("down projection", a * f),
        ]
    }

    /// The same when the gates alone learn: linear layers keep nothing, the gate its input.
    fn saved_by_frozen_weights(&self) -> u64 {
        let &Self { a, m, f, h, q, kv, routing, .. } = self;
        2 * ELEMENT * (m + 1) + self.head_norms() + a * (m + 2 * q + 2 * kv + 2 * f) + ELEMENT * h + routing
    }

    /// Bytes per token of a layer's values in a pass that keeps nothing, where most are alive: in SwiGLU.
    fn layer_in_flight(&self) -> u64 {
        let &Self { a, m, f, q, kv, .. } = self;
        2 * ELEMENT * m + a * (3 * m + 2 * q + 2 * kv + 3 * f)
    }

    fn head_norms(&self) -> u64 {
        let &Self { a, h, g, q, kv, .. } = self;
        if self.qk_norm { a * (q + kv) + ELEMENT * (h + g) } else { 0 }
    }

    /// Bytes per token that a layer's backward pass has in attention beside what was kept, less what its MLP has let go: gradients of the
    /// residual stream, the block, queries, keys and values.
    fn beside_attention(&self) -> u64 {
        let &Self { a, m, f, q, kv, .. } = self;
        (ELEMENT * m + a * (m + 2 * q + 2 * kv)).saturating_sub(ELEMENT * (m + 1) + a * 2 * f)
    }

    /// The copies of weights that products read.
    fn narrow_weights(&self) -> u64 {
        if self.narrow { self.a * self.weights } else { 0 }
    }

    /// Logits of `models` models at a time; two are compared in f32.
    fn head_chunk_bytes(&self, models: u64) -> u64 {
        if self.gpu {
            let of_row = if models == 1 { self.a } else { models * ELEMENT } * self.vocab as u64;
            let logits = (self.tokens * of_row).min(output_head::GPU_CHUNK_BYTES as u64);
            // The gradient of logits in f32 is rounded for the products that follow.
            return if self.narrow && models > 1 { logits + logits * self.a / (models * ELEMENT) } else { logits };
        }
        let rows = |n| output_head::chunk_rows(n, self.vocab) as u64;
        models * ELEMENT * rows(self.tokens as usize) * self.vocab as u64
    }
}

fn biases_of_layer(config: &ModelConfig) -> u64 {
    let d = config.head_dim as u64;
    let projections = if config.qkv_bias { (config.n_heads + 2 * config.n_kv_heads) as u64 * d } else { 0 };
    let norms = if config.qk_norm { 2 * d } else { 0 };
    projections + norms
}

#[cfg(test)]
mod tests {
    use sluice_spec::Architecture;
    use sluice_testkit::small_model;

    use super::*;

    fn config() -> ModelConfig {
        ModelConfig {
            n_layers: 3,
            d_model: 8,
            d_ff: 16,
            n_heads: 2,
            n_kv_heads: 1,
            head_dim: 4,
            vocab_size: 32,
            max_seq_len: 64,
            ..small_model(Architecture::Llama)
        }
    }

    #[test]
    fn activations_of_a_layer_equal_a_count_by_hand() {
        let memory = dense(&config(), 2, 10, 0);
        // h, 1/rms, x, (q, k, v, o, lse), h after attention, 1/rms, x, gate, up, gated
        let per_token = 8 + 1 + 8 + (8 + 4 + 4 + 8 + 2) + 8 + 1 + 8 + 16 + 16 + 16;
        assert_eq!(memory.layer.iter().map(|op| op.bytes).sum::<u64>(), 4 * 20 * per_token);
        assert_eq!(memory.saved_bytes, 3 * 4 * 20 * per_token);
    }

    #[test]
    fn checkpoints_keep_the_residual_stream_alone() {
        let memory = dense(&config(), 2, 10, 3);
        assert_eq!(memory.saved_bytes, 3 * 4 * 20 * 8);
        assert!(memory.peak_bytes < dense(&config(), 2, 10, 0).peak_bytes);
    }

    #[test]
    fn weights_are_counted_with_biases_norms_and_an_untied_head() {
        let config = ModelConfig { tie_embeddings: false, qkv_bias: true, qk_norm: true, ..config() };
        let model = crate::Decoder::random(&config, 1);
        let elements: usize = model.params().iter().map(|p| p.value.len()).sum();
        assert_eq!(dense(&config, 1, 1, 0).parameter_bytes, 4 * elements as u64);
    }

    #[test]
    fn every_layer_that_runs_again_saves_something() {
        let all: Vec<u64> = (0..=3).map(|recompute| dense(&config(), 2, 200, recompute).peak_bytes).collect();
        assert!(all.windows(2).all(|pair| pair[0] > pair[1]), "{all:?}");
    }
}
