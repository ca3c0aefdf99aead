//! One folder per op: forward and backward as plain functions on tensors, each with a naive twin.
//! Knows nothing about configs, policies, models or tapes.

mod attention_tile;
pub mod dense_attention;
pub mod routed_attention;
pub mod gate_score;
pub mod top_k_routing;
pub mod adamw;
pub mod add;
pub mod embedding;
pub mod gelu;
pub mod layer_norm;
pub mod linear;
pub mod output_head;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
mod row_chunks;
mod simd;
mod vector_math;
pub mod attention_mass;
