//! Shape of a decoder, parsed once from a Hugging Face `config.json` or from GGUF metadata.
//! After [`ModelConfig::validate`] nobody checks again.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// A configuration that cannot be used; the message names what was found and what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl ConfigError {
    /// An error with this message.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// Families that one decoder covers; they differ in biases and in query/key norms only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// Llama, SmolLM2: no biases.
    Llama,
    /// Qwen2, Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMS norm on each head's query and key.
    Qwen3,
}

impl Architecture {
    /// `model_type` in `config.json`, and `general.architecture` in GGUF.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// Parse a `model_type` or `general.architecture`.
    pub fn parse(name: &str) -> Result<Self, ConfigError> {
        match name {
            "llama" => Ok(Self::Llama),
            "qwen2" => Ok(Self::Qwen2),
            "qwen3" => Ok(Self::Qwen3),
            _ => Err(ConfigError::new(format!("model architecture `{name}` is not supported; expected llama, qwen2 or qwen3"))),
        }
    }

    fn hf_class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// Rotary position scaling for contexts longer than the model was trained on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum RopeScaling {
    /// Positions divided by `factor`.
    Linear {
        /// Ratio of the new to the original context.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context length of pre-training.
        original_max_seq_len: usize,
    },
}

/// Shape of a decoder-only transformer with rotary positions, RMS norms and SwiGLU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// `L`.
    pub n_layers: usize,
    /// `M`, width of the residual stream.
    pub d_model: usize,
    /// `F`, width of the SwiGLU.
    pub d_ff: usize,
    /// `H`, query heads.
    pub n_heads: usize,
    /// `G`, KV heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// `D`, width of one head; even.
    pub head_dim: usize,
    /// `V`.
    pub vocab_size: usize,
    /// Context length that the model was trained for.
    pub max_seq_len: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Scaling of the rotary frequencies, if any.
    #[serde(default)]
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the output head is the embedding.
    pub tie_embeddings: bool,
    /// Whether q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// Whether each head's query and key pass an RMS norm before the rotation.
    pub qk_norm: bool,
}

impl ModelConfig {
    /// Query heads that share one KV head.
    pub fn group_size(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Parameters of the base model, gates not counted.
    pub fn n_params(&self) -> usize {
        let q = self.n_heads * self.head_dim;
        let kv = self.n_kv_heads * self.head_dim;
        let attention = self.d_model * (2 * q + 2 * kv);
        let bias = if self.qkv_bias { q + 2 * kv } else { 0 };
        let qk_norm = if self.qk_norm { 2 * self.head_dim } else { 0 };
        let layer = attention + bias + qk_norm + 3 * self.d_model * self.d_ff + 2 * self.d_model;
        let embeddings = self.vocab_size * self.d_model * if self.tie_embeddings { 1 } else { 2 };
        embeddings + self.n_layers * layer + self.d_model
    }

    /// Check the invariants that everything downstream relies on, sizes that cannot be meant included.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("n_layers", self.n_layers, 1 << 12),
            ("d_model", self.d_model, 1 << 20),
            ("d_ff", self.d_ff, 1 << 22),
            ("n_heads", self.n_heads, 1 << 14),
            ("n_kv_heads", self.n_kv_heads, 1 << 14),
            ("head_dim", self.head_dim, 1 << 14),
            ("vocab_size", self.vocab_size, 1 << 24),
            ("max_seq_len", self.max_seq_len, 1 << 30),
        ];
        for (name, size, limit) in sizes {
            if size == 0 || size > limit {
                return Err(ConfigError::new(format!("{name} is {size}; expected 1 to {limit}")));
            }
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return Err(ConfigError::new(format!(
                "{} query heads cannot be shared among {} KV heads; expected a multiple",
                self.n_heads, self.n_kv_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ConfigError::new(format!("head_dim is {}; rotary positions need an even number", self.head_dim)));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(ConfigError::new(format!("norm_eps is {}; expected a number between 0 and 1", self.norm_eps)));
        }
        if !(self.rope_theta > 1.0 && self.rope_theta.is_finite()) {
            return Err(ConfigError::new(format!("rope_theta is {}; expected a finite number above 1", self.rope_theta)));
        }
        Ok(())
    }

    /// Parse a Hugging Face `config.json`. Anything that would change the numbers and that we do not
    /// compute (sliding windows, partial rotation, other activations) is an error, never ignored.
    pub fn from_hf_json(text: &str) -> Result<Self, ConfigError> {
        let root: Value = serde_json::from_str(text).map_err(|e| ConfigError::new(format!("not valid JSON: {e}")))?;
        let size = |key: &str| -> Result<usize, ConfigError> {
            root.get(key)
                .and_then(Value::as_u64)
                .map(|v| v as usize)
                .ok_or_else(|| ConfigError::new(format!("`{key}` is {}; expected a whole number", shown(root.get(key)))))
        };
        let size_or = |key: &str, default: usize| if is_set(&root, key) { size(key) } else { Ok(default) };
        let flag_or = |key: &str, default: bool| match root.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            other => Err(ConfigError::new(format!("`{key}` is {}; expected true or false", shown(other)))),
        };
        let number_or = |node: &Value, key: &str, default: f32| match node.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(v) => v.as_f64().map(|v| v as f32).ok_or_else(|| ConfigError::new(format!("`{key}` is {v}; expected a number"))),
        };

        let model_type = root.get("model_type").and_then(Value::as_str).unwrap_or("(missing)");
        let architecture = Architecture::parse(model_type)?;
        if let Some(act) = root.get("hidden_act").and_then(Value::as_str)
            && act != "silu"
        {
            return Err(ConfigError::new(format!("`hidden_act` is `{act}`; expected silu")));
        }
        for key in ["mlp_bias", "use_sliding_window"] {
            if flag_or(key, false)? {
                return Err(ConfigError::new(format!("`{key}` is true, which is not supported; expected false")));
            }
        }
        if let Some(p) = root.get("partial_rotary_factor").and_then(Value::as_f64)
            && p != 1.0
        {
            return Err(ConfigError::new(format!("`partial_rotary_factor` is {p}; expected 1")));
        }
        let attention_bias = flag_or("attention_bias", false)?;
        if attention_bias {
            return Err(ConfigError::new("`attention_bias` is true (a bias on o_proj too), which is not supported; expected false"));
        }

        let d_model = size("hidden_size")?;
        let n_heads = size("num_attention_heads")?;
        // transformers 5 moved theta and scaling into `rope_parameters`.
        let rope = ["rope_parameters", "rope_scaling"].iter().find_map(|k| root.get(*k)).filter(|v| !v.is_null());
        let theta_default = number_or(&root, "rope_theta", 10_000.0)?;
        let rope_theta = match rope {
            Some(node) => number_or(node, "rope_theta", theta_default)?,
            None => theta_default,
        };
        let rope_scaling = match rope {
            Some(node) => parse_rope_scaling(node)?,
            None => None,
        };
        let config = Self {
            architecture,
            n_layers: size("num_hidden_layers")?,
            d_model,
            d_ff: size("intermediate_size")?,
            n_heads,
            n_kv_heads: size_or("num_key_value_heads", n_heads)?,
            head_dim: size_or("head_dim", d_model / n_heads.max(1))?,
            vocab_size: size("vocab_size")?,
            max_seq_len: size_or("max_position_embeddings", 2048)?,
            norm_eps: number_or(&root, "rms_norm_eps", 1e-6)?,
            rope_theta,
            rope_scaling,
            tie_embeddings: flag_or("tie_word_embeddings", false)?,
            qkv_bias: architecture == Architecture::Qwen2,
            qk_norm: architecture == Architecture::Qwen3,
        };
        config.validate()?;
        Ok(config)
    }

    /// The same config as a Hugging Face `config.json` that transformers loads.
    pub fn to_hf_json(&self, bos_token_id: Option<u32>, eos_token_id: Option<u32>) -> Value {
        let scaling = self.rope_scaling.map(|s| match s {
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_seq_len } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor, "original_max_position_embeddings": original_max_seq_len,
            }),
        });
        json!({
            "architectures": [self.architecture.hf_class()],
            "model_type": self.architecture.name(),
            "hidden_act": "silu",
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_seq_len,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": false,
            "mlp_bias": false,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "torch_dtype": "float32",
        })
    }
}

fn parse_rope_scaling(node: &Value) -> Result<Option<RopeScaling>, ConfigError> {
    let kind = node.get("rope_type").or_else(|| node.get("type")).and_then(Value::as_str).unwrap_or("default");
    let number = |key: &str| {
        node.get(key)
            .and_then(Value::as_f64)
            .map(|v| v as f32)
            .ok_or_else(|| ConfigError::new(format!("rope scaling `{kind}` lacks the number `{key}`")))
    };
    match kind {
        "default" => Ok(None),
        "linear" => Ok(Some(RopeScaling::Linear { factor: number("factor")? })),
        "llama3" => Ok(Some(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_seq_len: number("original_max_position_embeddings")? as usize,
        })),
        _ => Err(ConfigError::new(format!("rope scaling `{kind}` is not supported; expected default, linear or llama3"))),
    }
}

fn is_set(root: &Value, key: &str) -> bool {
    root.get(key).is_some_and(|v| !v.is_null())
}

fn shown(value: Option<&Value>) -> String {
    value.map_or("missing".to_string(), Value::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn smollm2_json() -> Value {
        json!({"model_type": "llama", "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "rope_scaling": null, "tie_word_embeddings": true})
    }

    #[test]
    fn smollm2_has_135m_parameters() {
        let config = ModelConfig::from_hf_json(&smollm2_json().to_string()).unwrap();
        assert_eq!(config.n_params(), 134_515_008);
        assert_eq!((config.head_dim, config.group_size()), (64, 3));
    }

    #[test]
    fn config_survives_a_round_trip() {
        let mut config = ModelConfig::from_hf_json(&smollm2_json().to_string()).unwrap();
        config.rope_scaling =
            Some(RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_seq_len: 8192 });
        let again = ModelConfig::from_hf_json(&config.to_hf_json(Some(1), Some(2)).to_string()).unwrap();
        assert_eq!(config, again);
    }

    #[test]
    fn what_would_change_the_numbers_is_refused() {
        for (key, value, word) in [
            ("hidden_act", json!("gelu"), "gelu"),
            ("use_sliding_window", json!(true), "use_sliding_window"),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}), "yarn"),
            ("model_type", json!("mamba"), "mamba"),
            ("num_key_value_heads", json!(4), "multiple"),
            ("vocab_size", json!(1u64 << 60), "vocab_size"),
            ("hidden_size", json!("wide"), "wide"),
        ] {
            let mut root = smollm2_json();
            root[key] = value;
            let error = ModelConfig::from_hf_json(&root.to_string()).unwrap_err().to_string();
            assert!(error.contains(word), "{key}: {error}");
        }
    }
}
