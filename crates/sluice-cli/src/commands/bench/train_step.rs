//! `sluice bench train-step`: tokens per second of forward, full backward and AdamW, dense or routed.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde_json::json;
use sluice_model::{Policy, train_memory};
use sluice_spec::RoutingConfig;
use sluice_tensor::{DType, memory};

use super::train_config::{Setup, TokenFile};
use crate::commands::devices::cpu_name;
use crate::device::{DeviceArgs, name_and_precision, require_routable};
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
    /// Give every step the next tokens of a file (little-endian u16) instead of the same random batch
    #[arg(long, value_name = "FILE")]
    fresh_batches: Option<PathBuf>,
    /// Gates and routed attention in every layer instead of dense attention; the gates learn as well
    #[arg(long)]
    routed: bool,
    /// Local keys of a routed layer
    #[arg(long, value_name = "N", default_value_t = RoutingConfig::default().window, requires = "routed")]
    window: usize,
    /// Routed keys per KV head
    #[arg(long, value_name = "N", default_value_t = RoutingConfig::default().top_k, requires = "routed")]
    top_k: usize,
    /// Queries that share a decision of the router
    #[arg(long, value_name = "N", default_value_t = RoutingConfig::default().route_every, requires = "routed")]
    route_every: usize,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Steps that are not timed: the moments are allocated in the first one, and peers get two as well.
const WARM_UP: usize = 2;

impl Args {
    fn routing(&self) -> Result<Option<RoutingConfig>> {
        let Self { window, top_k, route_every, .. } = *self;
        let routing = RoutingConfig { window, top_k, route_every, ..RoutingConfig::default() };
        routing.validate()?;
        Ok(self.routed.then_some(routing))
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut setup = Setup::named(&args.config, args.context)?;
    setup.batch = args.batch.unwrap_or(setup.batch);
    let device = args.device.open()?;
    let routing = args.routing()?;
    let trainer = match routing {
        Some(routing) => {
            require_routable(&device, &setup.model, Policy::Gate)?;
            setup.routed_trainer(args.checkpoint, routing)
        }
        None => setup.trainer(args.checkpoint),
    };
    let mut trainer = trainer.to(&device);
    let n_steps = args.steps.max(1) + WARM_UP;
    let file = args.fresh_batches.as_deref().map(|path| TokenFile::read(path, &setup, n_steps)).transpose()?;
    let same = setup.tokens();
    let data = |step: usize| file.as_ref().map_or_else(|| same.clone(), |file| file.batch(&setup, step));
    if let Some(path) = &args.save_state {
        trainer.save(path)?;
    }
    let mut reports = (0..WARM_UP).map(|step| trainer.step(&data(step))).collect::<Result<Vec<_>>>()?;
    memory::reset_peak();
    for step in WARM_UP..n_steps {
        reports.push(trainer.step(&data(step))?);
    }
    let seconds: Vec<f64> = reports[WARM_UP..].iter().map(|report| report.seconds).collect();
    let losses: Vec<f32> = reports.iter().map(|report| report.loss).collect();
    let (first_loss, last_loss) = (losses[0], losses[losses.len() - 1]);
    let peak = memory::peak_bytes() as u64;
    // The same batch over and over, or text from random weights: a step that learns must bring the loss down.
    ensure!(last_loss < first_loss, "the loss went from {first_loss} to {last_loss}: this step does not learn");
    let tokens = (setup.batch * setup.context) as f64;
    let predicted = train_memory::dense(&setup.model, setup.batch, setup.context, if args.checkpoint { setup.model.n_layers } else { 0 });
    // The count knows dense attention and f32 alone.
    let predicted_peak =
        (routing.is_none() && device.gpu().is_none_or(|gpu| gpu.precision().activations() == DType::F32)).then_some(predicted.peak_bytes);
    let n_params: usize = trainer.model.params().iter().map(|param| param.value.len()).sum();
    let median = tokens / median(&seconds);
    let host_waits: Vec<u64> = reports[WARM_UP..].iter().map(|report| report.host_waits).collect();
    let (name, precision) = name_and_precision(&device);
    if args.json {
        println!(
            "{}",
            json!({"device": name, "precision": precision, "host_waits_inside_steps": host_waits, "engine": "sluice", "config": args.config, "context": setup.context, "batch": setup.batch,
                "threads": rayon::current_num_threads(), "steps": seconds.len(), "tokens_per_second": median, "seconds": seconds,
                "first_loss": first_loss, "last_loss": last_loss, "losses": losses, "learning_rates": reports.iter().map(|r| r.lr).collect::<Vec<_>>(), "n_params": n_params, "checkpoint": args.checkpoint,
                "peak_bytes": peak, "predicted_peak_bytes": predicted_peak, "routing": routing, "fresh_batches": file.is_some(), "cpu": cpu_name()})
        );
    } else {
        println!("{}: {median:.0} tokens/s (median of {}) on {name} in {precision}", args.config, seconds.len());
        let predicted = predicted_peak.map(|peak| format!(", predicted {}", bytes(peak))).unwrap_or_default();
        println!("peak memory {}{predicted}", bytes(peak));
    }
    Ok(())
}

fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
