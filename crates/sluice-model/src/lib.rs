//! One decoder for the llama, qwen2 and qwen3 families, dense or routed: gate, policies, layers, the
//! bounded cache and the cost model; the encoder of the BERT family; checkpoints in and out.
//! Single-device and stateless: knows nothing about device counts, optimizers or HTTP.

pub mod decoder;
pub mod layer;
pub mod policy;

pub mod encoder;

pub mod cache;
pub mod checkpoint;
pub mod cost;
pub mod train_memory;

pub use cache::Cache;
pub use decoder::{Decoder, Forward, Hidden};
pub use encoder::{Encoder, EncoderAttention, TextBatch};
pub use layer::{Attention, Gate, Layer, Linear, Mlp};
pub use policy::{AttentionPlan, GateNoise, Policy};
