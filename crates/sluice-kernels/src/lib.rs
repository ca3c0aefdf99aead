//! One folder per op: forward and backward as plain functions on tensors, each with a naive twin.
//! Knows nothing about configs, policies, models or tapes.

pub mod adamw;
pub mod add;
pub mod attention_label;
pub mod attention_mass;
mod attention_tile;
pub mod cached_attention;
pub mod centre;
pub mod dense_attention;
pub mod embedding;
pub mod gate_loss;
pub mod gate_score;
pub mod gelu;
pub mod gelu_mlp;
pub mod gumbel;
pub mod int8_linear;
pub mod kept_mass;
mod launch;
pub mod layer_norm;
pub mod linear;
pub mod log_rank;
pub mod mean_pool;
pub mod output_head;
pub mod repeat_heads;
pub mod ridge;
pub mod rms_norm;
pub mod rope;
pub mod routed_attention;
mod row_chunks;
pub mod selftest;
mod simd;
pub mod swiglu;
pub mod token_weights;
pub mod top_k_routing;
mod vector_math;
pub mod weighted_mse;
pub mod worker_team;
