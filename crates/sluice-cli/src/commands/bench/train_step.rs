//! `sluice bench train-step`: tokens per second of forward, full backward and AdamW.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde_json::json;
use sluice_model::train_memory;
use sluice_tensor::memory;

use super::train_config::Setup;
use crate::commands::devices::cpu_name;
use crate::device::DeviceArgs;
use crate::progress::bytes;

/// Arguments of `sluice bench train-step`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// `tiny` (6 layers of 128, T = 2048, B = 2) or `135m` (SmolLM2-135M, T = 512, B = 1)
    #[arg(long)]
    config: String,
    /// Tokens of a sequence, instead of the config's
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Steps that are timed, after two that are not
    #[arg(long, value_name = "N", default_value_t = 5)]
    steps: usize,
    /// Keep only the residual stream between layers and recompute the rest in backward
    #[arg(long)]
    checkpoint: bool,
    /// Sequences, instead of the config's
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Save the state before the first step, for a peer that starts from the same weights
    #[arg(long, value_name = "FILE")]
    save_state: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut setup = Setup::named(&args.config, args.context)?;
    setup.batch = args.batch.unwrap_or(setup.batch);
    let device = args.device.open()?;
    let (mut trainer, data) = (setup.trainer(args.checkpoint).to(&device), setup.tokens());
    if let Some(path) = &args.save_state {
        trainer.save(path)?;
    }
    // The moments are allocated in the first step; peers get two warm-up steps as well.
    let mut reports = vec![trainer.step(&data)?, trainer.step(&data)?];
    memory::reset_peak();
    let waits_before = device.gpu().map(|gpu| gpu.waits());
    for _ in 0..args.steps.max(1) {
        reports.push(trainer.step(&data)?);
    }
    let seconds: Vec<f64> = reports[2..].iter().map(|report| report.seconds).collect();
    let losses: Vec<f32> = reports.iter().map(|report| report.loss).collect();
    let (first_loss, last_loss) = (losses[0], losses[losses.len() - 1]);
    let peak = memory::peak_bytes() as u64;
    // The same batch over and over: a step that learns must bring the loss down.
    ensure!(last_loss < first_loss, "the loss went from {first_loss} to {last_loss}: this step does not learn");
    let tokens = (setup.batch * setup.context) as f64;
    let predicted = train_memory::dense(&setup.model, setup.batch, setup.context, args.checkpoint);
    let median = tokens / median(&seconds);
    // Reading the loss and the norm of the gradient are waits of the host; nothing else in a step should be.
    let waits_per_step = device.gpu().zip(waits_before).map(|(gpu, before)| (gpu.waits() - before) as f64 / seconds.len() as f64);
    let (name, precision) = match device.gpu() {
        Some(gpu) => (gpu.name().to_string(), gpu.precision().name()),
        None => (cpu_name(), "f32"),
    };
    if args.json {
        println!(
            "{}",
            json!({"device": name, "precision": precision, "waits_per_step": waits_per_step, "engine": "sluice", "config": args.config, "context": setup.context, "batch": setup.batch,
                "threads": rayon::current_num_threads(), "steps": seconds.len(), "tokens_per_second": median, "seconds": seconds,
                "first_loss": first_loss, "last_loss": last_loss, "losses": losses, "learning_rates": reports.iter().map(|r| r.lr).collect::<Vec<_>>(), "n_params": predicted.parameter_bytes / 4, "checkpoint": args.checkpoint,
                "peak_bytes": peak, "predicted_peak_bytes": predicted.peak_bytes, "cpu": cpu_name()})
        );
    } else {
        println!("{}: {median:.0} tokens/s (median of {}) on {name} in {precision}", args.config, seconds.len());
        println!("peak memory {}, predicted {}", bytes(peak), bytes(predicted.peak_bytes));
    }
    Ok(())
}

fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
