//! Training: distillation of a dense model into a routed one, and training from random weights.
//! Runs are lists of steps with saved state; knows nothing about progress bars, reports or serving.

pub mod distill;
pub mod distill_config;

pub mod documents;
pub mod gate_loss;
pub mod warm_start;

pub mod pretrain;

pub mod hash;
pub mod optimizer;
pub mod schedule;
pub mod snapshot;

mod curriculum;
