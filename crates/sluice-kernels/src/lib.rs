//! One folder per op: forward and backward as plain functions on tensors, each with a naive twin.
//! Knows nothing about configs, policies, models or tapes.

pub mod routed_attention;
pub mod gate_score;
pub mod top_k_routing;
