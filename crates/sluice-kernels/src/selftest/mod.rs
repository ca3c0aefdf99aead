//! The case list of every op that runs on more than one device: forward and backward against the naive twin, on odd sizes,
//! with fresh memory poisoned. The same cases are tests on the CPU and `sluice selftest` on a GPU.
//!
//! An op joins with a `cases.rs` beside its `naive.rs` and a line in `OPS`.

mod check;
#[cfg(test)]
mod tests;

use sluice_tensor::Device;

pub use check::{Check, Outcome};

/// Which cases to run: all of them by default.
#[derive(Clone, Copy, Debug, Default)]
pub struct Only<'a> {
    /// Those of this op.
    pub op: Option<&'a str>,
    /// Those whose name contains this.
    pub case: Option<&'a str>,
}

/// Run cases on a device; `report` hears about every output that was compared.
pub fn run(device: &Device, only: Only<'_>, mut report: impl FnMut(Outcome)) {
    if let Some(gpu) = device.gpu() {
        gpu.poison_fresh_memory(true);
    }
    for (_, check_op) in OPS.iter().filter(|(name, _)| only.op.is_none_or(|op| op == *name)) {
        check_op(&mut Check::new(device, only.case, &mut report));
    }
    if let Some(gpu) = device.gpu() {
        gpu.poison_fresh_memory(false);
    }
}

/// Names of the ops, for `run`.
pub fn ops() -> impl Iterator<Item = &'static str> {
    OPS.iter().map(|(name, _)| *name)
}

/// Runs all cases of an op.
type Cases = fn(&mut Check<'_>);

/// Every op, in the order of a forward pass.
const OPS: &[(&str, Cases)] = &[
    ("embedding", crate::embedding::cases::run),
    ("rms_norm", crate::rms_norm::cases::run),
    ("layer_norm", crate::layer_norm::cases::run),
    ("linear", crate::linear::cases::run),
    ("rope", crate::rope::cases::run),
    ("gate_score", crate::gate_score::cases::run),
    ("centre", crate::centre::cases::run),
    ("repeat_heads", crate::repeat_heads::cases::run),
    ("gumbel", crate::gumbel::cases::run),
    ("top_k_routing", crate::top_k_routing::cases::run),
    ("routed_attention", crate::routed_attention::cases::run),
    ("dense_attention", crate::dense_attention::cases::run),
    ("add", crate::add::cases::run),
    ("swiglu", crate::swiglu::cases::run),
    ("gelu", crate::gelu::cases::run),
    ("gelu_mlp", crate::gelu_mlp::cases::run),
    ("mean_pool", crate::mean_pool::cases::run),
    ("output_head", crate::output_head::cases::run),
    ("token_weights", crate::token_weights::cases::run),
    ("kept_mass", crate::kept_mass::cases::run),
    ("attention_label", crate::attention_label::cases::run),
    ("attention_mass", crate::attention_mass::cases::run),
    ("log_rank", crate::log_rank::cases::run),
    ("ridge", crate::ridge::cases::run),
    ("gate_loss", crate::gate_loss::cases::run),
    ("weighted_mse", crate::weighted_mse::cases::run),
    ("adamw", crate::adamw::cases::run),
];
