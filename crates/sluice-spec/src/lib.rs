//! Plain data that every part of Sluice agrees on: model and routing configs, tensor names, artifacts.
//! Knows nothing about compute.

pub mod artifact;
pub mod encoder;
pub mod model;
pub mod rope_frequencies;
pub mod routing;
pub mod tensor_names;
pub mod tokenizer;

pub use encoder::EncoderConfig;
pub use model::{Architecture, ConfigError, ModelConfig, RopeScaling};
pub use routing::{GateHeads, RoutingConfig};
pub use tokenizer::{GgufTokenizer, TextConfig, TokenizerSource};
