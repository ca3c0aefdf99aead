//! One folder per op: forward and backward as plain functions on tensors.
