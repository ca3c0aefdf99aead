//! Where each tensor of an artifact lies, by its role: looked up by name once, when an engine is made.

use sluice_spec::artifact::{EMBED, FINAL_NORM, LM_HEAD, of_layer};

use crate::artifact::{Artifact, FloatPlace, Int8Place};

/// Tensors of a model.
pub(crate) struct Weights {
    /// `[V, M]`.
    pub(crate) embed: Int8Place,
    /// `[M]`.
    pub(crate) final_norm: FloatPlace,
    /// `[V, M]`.
    pub(crate) head: Int8Place,
    /// First to last.
    pub(crate) layers: Vec<LayerWeights>,
}

/// Tensors of one layer.
pub(crate) struct LayerWeights {
    /// `[M]`.
    pub(crate) input_norm: FloatPlace,
    /// `[(H + 2 G) D, M]`: queries, keys, values.
    pub(crate) qkv: Int8Place,
    /// `[(H + 2 G) D]`.
    pub(crate) qkv_bias: Option<FloatPlace>,
    /// `[D]` for queries and for keys, before the rotation.
    pub(crate) qk_norms: Option<(FloatPlace, FloatPlace)>,
    /// `[M, H D]`.
    pub(crate) o: Int8Place,
    /// `[M]`.
    pub(crate) post_norm: FloatPlace,
    /// `[2 F, M]`: SwiGLU's gate, then up.
    pub(crate) gate_up: Int8Place,
    /// `[M, F]`.
    pub(crate) down: Int8Place,
    /// The routing gate.
    pub(crate) gate: Option<GateWeights>,
}

/// Gate of one layer.
pub(crate) struct GateWeights {
    /// `[Gs, M]`.
    pub(crate) weight: FloatPlace,
    /// `[Gs]`.
    pub(crate) bias: FloatPlace,
    /// `[Gs]`.
    pub(crate) recency: FloatPlace,
}

impl Weights {
    pub(crate) fn of(artifact: &Artifact) -> Self {
        let model = &artifact.manifest.model;
        let embed = artifact.int8_place(EMBED);
        Self {
            embed,
            final_norm: artifact.float_place(FINAL_NORM),
            head: if model.tie_embeddings { embed } else { artifact.int8_place(LM_HEAD) },
            layers: (0..model.n_layers).map(|layer| LayerWeights::of(artifact, layer)).collect(),
        }
    }
}

impl LayerWeights {
    fn of(artifact: &Artifact, layer: usize) -> Self {
        let int8 = |part: &str| artifact.int8_place(&of_layer(layer, part));
        let float = |part: &str| artifact.float_place(&of_layer(layer, part));
        let model = &artifact.manifest.model;
        Self {
            input_norm: float("input_norm"),
            qkv: int8("qkv"),
            qkv_bias: model.qkv_bias.then(|| float("qkv.bias")),
            qk_norms: model.qk_norm.then(|| (float("q_norm"), float("k_norm"))),
            o: int8("o"),
            post_norm: float("post_norm"),
            gate_up: int8("gate_up"),
            down: int8("down"),
            gate: artifact.manifest.has_gates.then(|| GateWeights {
                weight: float("gate.weight"),
                bias: float("gate.bias"),
                recency: float("gate.recency"),
            }),
        }
    }
}
