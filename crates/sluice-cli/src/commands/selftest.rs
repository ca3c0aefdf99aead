//! `sluice selftest`: every op of a device, forward and backward, against its naive twin, with fresh memory poisoned.

use anyhow::{Result, ensure};
use serde_json::json;
use sluice_kernels::selftest::{self, Only, Outcome};
use sluice_tensor::Device;
use sluice_tensor::cuda::{CudaError, Gpu};

use super::host_waits;
use crate::device::{DeviceArgs, name_and_precision};

/// Arguments of `sluice selftest`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    device: DeviceArgs,
    /// Only this op's cases
    #[arg(long, value_name = "NAME")]
    op: Option<String>,
    /// Only cases whose name contains this, as listed by --all
    #[arg(long, value_name = "TEXT")]
    case: Option<String>,
    /// List every comparison, not only each op's worst
    #[arg(long)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let device = args.device.open()?;
    let mut outcomes = Vec::new();
    let only = args.op.as_deref();
    if let Some(op) = only {
        let mut all = selftest::ops().chain([host_waits::OP]);
        ensure!(
            all.any(|known| known == op),
            "no op {op}; there are {}",
            selftest::ops().chain([host_waits::OP]).collect::<Vec<_>>().join(", ")
        );
    }
    selftest::run(&device, Only { op: only, case: args.case.as_deref() }, |outcome| outcomes.push(outcome));
    if let (Device::Cuda(gpu), None) = (&device, &args.case) {
        if only.is_none_or(|op| op == host_waits::OP) {
            outcomes.extend(host_waits::outcomes(gpu)?);
        }
        if only.is_none() {
            outcomes.push(memory_outcome(gpu));
        }
    }
    if let Some(text) = &args.case {
        ensure!(!outcomes.is_empty(), "no case has {text:?} in its name; --all lists them");
    }
    let failed: Vec<&Outcome> = outcomes.iter().filter(|o| !o.passes()).collect();
    let (name, precision) = name_and_precision(&device);
    if args.json {
        let row = |o: &Outcome| json!({"op": o.op, "case": o.case, "output": o.output, "error": o.error, "allowed": o.allowed, "passes": o.passes()});
        let rows: Vec<_> = outcomes.iter().map(row).collect();
        println!(
            "{}",
            json!({"device": name, "precision": precision, "compared": outcomes.len(), "failed": failed.len(), "outcomes": rows})
        );
    } else {
        let shown = if args.all { outcomes.iter().collect() } else { worst_of_each_output(&outcomes) };
        println!("{:<14} {:<42} {:<38} {:>9} {:>9}", "op", "output", "case", "error", "allowed");
        for o in shown.iter().chain(if args.all { [].iter() } else { failed.iter() }) {
            let verdict = if o.passes() { "" } else { "  FAILED" };
            println!("{:<14} {:<42} {:<38} {:>9.2e} {:>9.2e}{verdict}", o.op, o.output, o.case, o.error, o.allowed);
        }
        println!("{} comparisons on {name}, factors of products in {precision}: {} failed", outcomes.len(), failed.len());
    }
    ensure!(failed.is_empty(), "{} of {} comparisons failed", failed.len(), outcomes.len());
    Ok(())
}

/// For every output of every op the comparison that used most of its tolerance.
fn worst_of_each_output(outcomes: &[Outcome]) -> Vec<&Outcome> {
    let used = |o: &Outcome| if o.allowed > 0.0 { o.error / o.allowed } else { o.error };
    let mut worst: Vec<&Outcome> = Vec::new();
    for outcome in outcomes {
        match worst.iter_mut().find(|w| w.op == outcome.op && w.output == outcome.output) {
            Some(w) if used(w) < used(outcome) => *w = outcome,
            Some(_) => {}
            None => worst.push(outcome),
        }
    }
    worst
}

/// An allocation that cannot fit must be refused with an account, and leave the device usable.
fn memory_outcome(gpu: &std::sync::Arc<Gpu>) -> Outcome {
    let refused = matches!(gpu.alloc(gpu.info().memory * 2), Err(CudaError::OutOfMemory { .. }));
    let usable =
        gpu.upload_slice(&[1.0f32, 2.0]).and_then(|buffer| gpu.download_slice::<f32>(&buffer)).is_ok_and(|back| back == [1.0, 2.0]);
    let error = if refused && usable && gpu.current_bytes() == 0 { 0.0 } else { f64::INFINITY };
    Outcome { op: "memory", case: "twice the GPU's memory".into(), output: "refused, nothing leaks, usable after", error, allowed: 0.0 }
}
