//! Names of tensors on disk: Hugging Face's for the base weights, our own for the gates.

/// Token embedding `[V, M]`; also the output head when the embeddings are tied.
pub const EMBED: &str = "model.embed_tokens.weight";
/// Final RMS norm `[M]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// Output head `[V, M]` of a model whose embeddings are not tied.
pub const LM_HEAD: &str = "lm_head.weight";

/// A tensor of layer `layer`, for instance `of_layer(3, "self_attn.q_proj.weight")`.
pub fn of_layer(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}")
}

/// Gate weight of a layer, `[gate heads, M]`.
pub fn gate_weight(layer: usize) -> String {
    format!("sluice.layers.{layer}.gate.weight")
}

/// Gate bias of a layer, `[gate heads]`.
pub fn gate_bias(layer: usize) -> String {
    format!("sluice.layers.{layer}.gate.bias")
}

/// Recency slope of a layer's gate, `[gate heads]`, in score units per 1024 positions.
pub fn gate_recency(layer: usize) -> String {
    format!("sluice.layers.{layer}.gate.recency")
}

/// Names of an encoder of the BERT family.
pub mod bert {
    /// `[V, M]`.
    pub const WORDS: &str = "embeddings.word_embeddings.weight";
    /// `[max_seq_len, M]`.
    pub const POSITIONS: &str = "embeddings.position_embeddings.weight";
    /// `[n_types, M]`.
    pub const TYPES: &str = "embeddings.token_type_embeddings.weight";
    /// Norm of the embeddings, to which `.weight` and `.bias` are added, `[M]` each.
    pub const NORM: &str = "embeddings.LayerNorm";

    /// A tensor of layer `layer`, for instance `of_layer(3, "attention.self.query.weight")`.
    pub fn of_layer(layer: usize, part: &str) -> String {
        format!("encoder.layer.{layer}.{part}")
    }
}
