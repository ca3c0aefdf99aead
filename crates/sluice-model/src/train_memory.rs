//! What a training step of a dense decoder holds in memory, counted from shapes alone: weights, moments, gradients, and the
//! activations that each layer keeps for its backward pass, with and without checkpoints. `sluice bench train-step` prints
//! it beside what it measured.
//!
//! A figure per token is in elements; everything is f32. Small things that a step also allocates (positions, sums over rows,
//! thread scratch) are left out, so the measured peak is a little higher.

use serde::{Deserialize, Serialize};
use sluice_kernels::output_head;
use sluice_spec::ModelConfig;

/// Counted memory of one training step on `batch` sequences of `context` tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainMemory {
    /// Tokens of a sequence.
    pub context: usize,
    /// Sequences.
    pub batch: usize,
    /// Whether each layer is a checkpoint segment.
    pub checkpoint: bool,
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

/// Count a step in which every weight learns.
pub fn dense(config: &ModelConfig, batch: usize, context: usize, checkpoint: bool) -> TrainMemory {
    let tokens = (batch * context) as u64;
    let (m, f, h) = (config.d_model as u64, config.d_ff as u64, config.n_heads as u64);
    let (q, kv) = (h * config.head_dim as u64, (config.n_kv_heads * config.head_dim) as u64);
    let n_layers = config.n_layers as u64;
    let head_norms = if config.qk_norm { q + kv + h + config.n_kv_heads as u64 } else { 0 };

    // Elements per token, in the order of the forward pass. A linear layer keeps its input, unless somebody has it already.
    let saved = [
        ("input norm", m + 1),
        ("q, k and v projections", m),
        ("head norms", head_norms),
        ("attention", 2 * q + 2 * kv + h),
        ("MLP norm", m + 1),
        ("gate and up projections", m),
        ("SwiGLU", 2 * f),
        ("down projection", f),
    ];
    let per_layer: u64 = saved.iter().map(|(_, elements)| elements).sum();
    let kept_by_layer = if checkpoint { m } else { per_layer };

    let weights_of_layer = m * (2 * q + 2 * kv + 3 * f + 2) + biases_of_layer(config);
    let embedding = config.vocab_size as u64 * m;
    let head = if config.tie_embeddings { 0 } else { embedding };
    let weights = embedding + head + n_layers * weights_of_layer + m;

    let n_chunk = output_head::rows_per_chunk(context * batch, config.vocab_size) as u64;
    let head_chunk = n_chunk * config.vocab_size as u64;

    // Candidates for the fullest moment; what is alive all the time (weights, moments) is added at the end.
    // The final norm keeps the last residual stream and gives a normalised one, both with their gradient.
    let around_head = embedding + tokens * (3 * m + 1);
    let mut fullest = tokens * n_layers * kept_by_layer + around_head + head_chunk;
    // The backward pass frees activations and fills in gradients, layer by layer from the last one.
    for below in 0..n_layers {
        let gradients = weights - embedding * u64::from(!config.tie_embeddings) - below * weights_of_layer;
        // The segment's own input is among what the tape outside keeps.
        let replayed = if checkpoint { per_layer - m } else { 0 };
        let kept = (below + 1) * kept_by_layer + replayed;
        // In SwiGLU: the gradients of the stream, of its output and of its two inputs; the down projection's input has gone.
        let at_swiglu = m + 3 * f - f;
        // In attention: gradients of the stream, of the output, of queries, keys and values; the MLP's activations have gone.
        let parts = key_gradient_parts(config, batch, context);
        let at_attention = (m + 2 * q + 2 * kv + parts).saturating_sub(3 * f + 2 * m + 1);
        // The final norm's normalised output lives as long as the step.
        fullest = fullest.max(gradients + tokens * (kept + m + at_swiglu.max(at_attention)));
    }
    fullest = fullest.max(weights + tokens * m);
    let bytes = |elements: u64| ELEMENT * elements;
    TrainMemory {
        context,
        batch,
        checkpoint,
        parameter_bytes: bytes(weights),
        moment_bytes: bytes(2 * weights),
        gradient_bytes: bytes(weights),
        layer: saved
            .iter()
            .filter(|(_, elements)| *elements > 0)
            .map(|(op, elements)| SavedBytes { op: (*op).into(), bytes: bytes(tokens * elements) })
            .collect(),
        saved_bytes: bytes(tokens * n_layers * kept_by_layer),
        head_chunk_bytes: bytes(head_chunk),
        peak_bytes: bytes(3 * weights + fullest),
    }
}

fn biases_of_layer(config: &ModelConfig) -> u64 {
    let d = config.head_dim as u64;
    let projections = if config.qkv_bias { (config.n_heads + 2 * config.n_kv_heads) as u64 * d } else { 0 };
    let norms = if config.qk_norm { 2 * d } else { 0 };
    projections + norms
}

/// Per token: sums of key gradients that attention's backward pass holds while its chunks of queries are under way, about
/// one and a half copies of the gradients of keys and values for two chunks, two and a half for four.
fn key_gradient_parts(config: &ModelConfig, batch: usize, context: usize) -> u64 {
    let chunks = sluice_kernels::dense_attention::backward_chunks(batch, config.n_kv_heads, context) as f64;
    // Chunks of equal work under a causal mask end at sqrt(i / n) of the sequence.
    let copies: f64 = (1..=chunks as usize).map(|i| (i as f64 / chunks).sqrt()).sum();
    let row = (2 * config.head_dim.next_multiple_of(16) + 1) * config.n_kv_heads;
    (copies * row as f64) as u64
}
