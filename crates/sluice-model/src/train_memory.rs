//! What a training step of a dense decoder holds in memory, counted from shapes alone: weights, moments, gradients, and the
//! activations that each layer keeps for its backward pass, with and without checkpoints. `sluice bench train-step` prints
//! it beside what it measured.
//!
//! Everything is f32. Small things that a step also allocates (positions, sums over rows,
//! sums of key gradients in attention) are left out, so the measured peak is a little higher.

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

    let head_chunk = (output_head::chunk_rows(context * batch, config.vocab_size) * config.vocab_size) as u64;

    // The fullest moment is one of these; weights and moments, alive all the time, are added at the end.
    // In the output head: the last residual stream, kept by the final norm, its result, the gradient of that, and of the head.
    let in_head = tokens * (n_layers * kept_by_layer + 3 * m + 1) + embedding + head_chunk;
    // In SwiGLU on the way back, layer by layer: activations go and gradients come. The down projection has done its part; alive
    // are the gradients of the residual stream and of SwiGLU's output and inputs. The final norm's result lives as long as the step.
    let in_layer = (0..n_layers).map(|below| {
        let gradients = embedding + m + (n_layers - 1 - below) * weights_of_layer + m * f;
        // A segment runs again as a whole; its input is among what the tape around it keeps.
        let replayed = if checkpoint { per_layer - m } else { 0 };
        let kept = (below + 1) * kept_by_layer + replayed - f;
        gradients + tokens * (kept + m + m + 3 * f)
    });
    // At the end: every gradient, and that of the embedded tokens.
    let at_end = weights + tokens * 2 * m;
    let fullest = in_layer.chain([in_head, at_end]).max().expect("a chain of at least two");
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

#[cfg(test)]
mod tests {
    use sluice_spec::Architecture;

    use super::*;

    fn config() -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Llama,
            n_layers: 3,
            d_model: 8,
            d_ff: 16,
            n_heads: 2,
            n_kv_heads: 1,
            head_dim: 4,
            vocab_size: 32,
            max_seq_len: 64,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: None,
            tie_embeddings: true,
            qkv_bias: false,
            qk_norm: false,
        }
    }

    #[test]
    fn activations_of_a_layer_equal_a_count_by_hand() {
        let memory = dense(&config(), 2, 10, false);
        // h, 1/rms, x, (q, k, v, o, lse), h after attention, 1/rms, x, gate, up, gated
        let per_token = 8 + 1 + 8 + (8 + 4 + 4 + 8 + 2) + 8 + 1 + 8 + 16 + 16 + 16;
        assert_eq!(memory.layer.iter().map(|op| op.bytes).sum::<u64>(), 4 * 20 * per_token);
        assert_eq!(memory.saved_bytes, 3 * 4 * 20 * per_token);
    }

    #[test]
    fn checkpoints_keep_the_residual_stream_alone() {
        let memory = dense(&config(), 2, 10, true);
        assert_eq!(memory.saved_bytes, 3 * 4 * 20 * 8);
        assert!(memory.peak_bytes < dense(&config(), 2, 10, false).peak_bytes);
    }

    #[test]
    fn weights_are_counted_with_biases_norms_and_an_untied_head() {
        let config = ModelConfig { tie_embeddings: false, qkv_bias: true, qk_norm: true, ..config() };
        let model = crate::Decoder::random(&config, 1);
        let elements: usize = model.params().iter().map(|p| p.value.len()).sum();
        assert_eq!(dense(&config, 1, 1, false).parameter_bytes, 4 * elements as u64);
    }
}
