//! The case list of every op that runs on more than one device: forward and backward against the naive twin, on odd sizes,
//! with fresh memory poisoned. The same cases are tests on the CPU and `sluice selftest` on a GPU.
//!
//! An op joins with a `cases.rs` beside its `naive.rs` and a line in [`run`].

mod check;
#[cfg(test)]
mod tests;

use sluice_tensor::Device;

pub use check::{Check, Outcome};

/// Run every case on a device; `report` hears about every output that was compared.
pub fn run(device: &Device, mut report: impl FnMut(Outcome)) {
    if let Some(gpu) = device.gpu() {
        gpu.poison_fresh_memory(true);
    }
    for check_op in OPS {
        check_op(&mut Check::new(device, &mut report));
    }
    if let Some(gpu) = device.gpu() {
        gpu.poison_fresh_memory(false);
    }
}

/// Every op, in the order of a forward pass.
const OPS: &[fn(&mut Check<'_>)] = &[
    crate::embedding::cases::run,
    crate::rms_norm::cases::run,
    crate::linear::cases::run,
    crate::rope::cases::run,
    crate::gate_score::cases::run,
    crate::dense_attention::cases::run,
    crate::add::cases::run,
    crate::swiglu::cases::run,
    crate::output_head::cases::run,
    crate::adamw::cases::run,
];
