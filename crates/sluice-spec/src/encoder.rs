//! Shape of an encoder of the BERT family, parsed once from a Hugging Face `config.json`. After [`EncoderConfig::validate`] nobody
//! checks again.

use serde::{Deserialize, Serialize};

use crate::ConfigError;

/// Shape of a bidirectional transformer with learned positions, layer norms behind each block, the exact GELU and biases everywhere
/// (BERT, arXiv 1810.04805).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderConfig {
    /// `L`.
    pub n_layers: usize,
    /// `M`, width of the residual stream.
    pub d_model: usize,
    /// `F`, width of the hidden layer.
    pub d_ff: usize,
    /// `H`, heads; divides `d_model`.
    pub n_heads: usize,
    /// `V`.
    pub vocab_size: usize,
    /// Positions that have an embedding: no sequence is longer.
    pub max_seq_len: usize,
    /// Kinds of segments that have an embedding.
    pub n_types: usize,
    /// Epsilon of every layer norm.
    pub norm_eps: f32,
}

/// The keys of a `config.json` that change what is computed.
#[derive(Deserialize)]
struct HfConfig {
    model_type: String,
    num_hidden_layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    #[serde(default = "two")]
    type_vocab_size: usize,
    #[serde(default = "tiny")]
    layer_norm_eps: f32,
    #[serde(default = "gelu")]
    hidden_act: String,
    #[serde(default = "absolute")]
    position_embedding_type: String,
    #[serde(default)]
    is_decoder: bool,
    #[serde(default)]
    add_cross_attention: bool,
}

fn two() -> usize {
    2
}

fn tiny() -> f32 {
    1e-12
}

fn gelu() -> String {
    "gelu".into()
}

fn absolute() -> String {
    "absolute".into()
}

impl EncoderConfig {
    /// BERT-large (arXiv 1810.04805, table of section 3).
    pub fn bert_large() -> Self {
        Self { n_layers: 24, d_model: 1024, d_ff: 4096, n_heads: 16, vocab_size: 30_522, max_seq_len: 512, n_types: 2, norm_eps: 1e-12 }
    }

    /// `D`, width of a head.
    pub fn head_dim(&self) -> usize {
        self.d_model / self.n_heads
    }

    /// Parameters: embeddings, layers, norms.
    pub fn n_params(&self) -> usize {
        let (m, f) = (self.d_model, self.d_ff);
        let layer = 4 * (m * m + m) + 2 * m * f + f + m + 4 * m;
        (self.vocab_size + self.max_seq_len + self.n_types) * m + 2 * m + self.n_layers * layer
    }

    /// Floating-point operations of one forward pass over `batch` sequences of `tokens`: matrix products and attention.
    pub fn forward_flops(&self, batch: usize, tokens: usize) -> f64 {
        let (m, f, n) = (self.d_model as f64, self.d_ff as f64, (batch * tokens) as f64);
        self.n_layers as f64 * n * (2.0 * m * (4.0 * m + 2.0 * f) + 4.0 * m * tokens as f64)
    }

    /// Check the invariants that everything downstream relies on, sizes that cannot be meant included.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("num_hidden_layers", self.n_layers, 1 << 12),
            ("hidden_size", self.d_model, 1 << 20),
            ("intermediate_size", self.d_ff, 1 << 22),
            ("num_attention_heads", self.n_heads, 1 << 14),
            ("vocab_size", self.vocab_size, 1 << 24),
            ("max_position_embeddings", self.max_seq_len, 1 << 24),
            ("type_vocab_size", self.n_types, 1 << 10),
        ];
        for (name, size, limit) in sizes {
            if size == 0 || size > limit {
                return Err(ConfigError::new(format!("{name} is {size}; expected 1 to {limit}")));
            }
        }
        if !self.d_model.is_multiple_of(self.n_heads) {
            let (m, h) = (self.d_model, self.n_heads);
            return Err(ConfigError::new(format!("hidden_size {m} cannot be shared among {h} heads; expected a multiple")));
        }
        // Above 0 in f32: a row of equal numbers must not divide by zero.
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(ConfigError::new(format!("layer_norm_eps is {}; expected a number between 0 and 1", self.norm_eps)));
        }
        Ok(())
    }

    /// Parse a Hugging Face `config.json`. What would change the numbers and is not computed here is an error.
    pub fn from_hf_json(text: &str) -> Result<Self, ConfigError> {
        let hf: HfConfig = serde_json::from_str(text).map_err(|e| ConfigError::new(format!("not the config of an encoder: {e}")))?;
        let only = |key: &str, found: &str, known: &str| match found == known {
            true => Ok(()),
            false => Err(ConfigError::new(format!("`{key}` is `{found}`, which is not supported; expected {known}"))),
        };
        only("model_type", &hf.model_type, "bert")?;
        only("hidden_act", &hf.hidden_act, "gelu")?;
        only("position_embedding_type", &hf.position_embedding_type, "absolute")?;
        only("is_decoder", &hf.is_decoder.to_string(), "false")?;
        only("add_cross_attention", &hf.add_cross_attention.to_string(), "false")?;
        let config = Self {
            n_layers: hf.num_hidden_layers,
            d_model: hf.hidden_size,
            d_ff: hf.intermediate_size,
            n_heads: hf.num_attention_heads,
            vocab_size: hf.vocab_size,
            max_seq_len: hf.max_position_embeddings,
            n_types: hf.type_vocab_size,
            norm_eps: hf.layer_norm_eps,
        };
        config.validate()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINILM: &str = r#"{"architectures": ["BertModel"], "hidden_act": "gelu", "hidden_size": 384, "intermediate_size": 1536,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
        "num_hidden_layers": 6, "type_vocab_size": 2, "vocab_size": 30522, "position_embedding_type": "absolute"}"#;

    #[test]
    fn a_bert_config_is_read() {
        let config = EncoderConfig::from_hf_json(MINILM).unwrap();
        assert_eq!((config.n_layers, config.head_dim(), config.n_params()), (6, 32, 22_565_376));
    }

    #[test]
    fn what_would_change_the_numbers_is_refused_by_name() {
        for (from, to, named) in [
            ("\"bert\"", "\"roberta\"", "model_type"),
            ("\"gelu\"", "\"gelu_new\"", "hidden_act"),
            ("\"absolute\"", "\"relative_key\"", "position_embedding_type"),
            ("384", "385", "385"),
            ("1e-12", "0.0", "layer_norm_eps"),
            ("\"vocab_size\"", "\"vocab\"", "vocab_size"),
        ] {
            let error = EncoderConfig::from_hf_json(&MINILM.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(named), "{from} -> {to}: {error}");
        }
    }

    #[test]
    fn bert_large_has_the_published_size() {
        // 335M with the pooler, which is 1.05M of it.
        assert_eq!(EncoderConfig::bert_large().n_params(), 334_092_288);
    }
}
