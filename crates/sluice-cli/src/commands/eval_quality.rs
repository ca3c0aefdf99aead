//! `sluice eval quality`: what policies lose against dense attention at several budgets, on texts of the user's choice.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use sluice_eval::measured::Measured;
use sluice_eval::quality::{Comparison, quality_table};
use sluice_eval::report::{Report, RunSummary};
use sluice_model::Policy;
use sluice_spec::RoutingConfig;

use crate::commands::devices::cpu_name;
use crate::commands::distill::compared_policy;
use crate::device::{self, DeviceArgs};
use crate::distill_data::{held_out_domains, held_windows};
use crate::distill_report::command;
use crate::models;
use crate::progress;

/// Arguments of `sluice eval quality`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face folder, pulled model or `tiny`
    #[arg(long)]
    model: String,
    /// Gate file for the model
    #[arg(long, value_name = "FILE")]
    gates: Option<PathBuf>,
    /// Texts (UTF-8, documents separated by form feeds) instead of the embedded held-out ones
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Tokens of a window
    #[arg(long, value_name = "N", default_value_t = 4096)]
    context: usize,
    /// Windows of each text
    #[arg(long, value_name = "N", default_value_t = 2)]
    windows: usize,
    /// Moves the windows within their documents
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Total budgets in tokens per KV head: window and routed keys
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [256, 512, 1024, 2048])]
    budget: Vec<usize>,
    /// Policies compared with dense attention
    #[arg(long, value_name = "POLICY", value_parser = compared_policy, num_args = 1.., default_values = ["gate", "streaming"])]
    policy: Vec<Policy>,
    /// Folder of the report, and of finished comparisons, from which an interrupted run continues
    #[arg(long, value_name = "DIR", default_value = "out/quality")]
    out: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let device = args.device.open()?;
    let loaded = models::load(&args.model, args.gates.as_deref())?;
    if args.policy.contains(&Policy::Gate) && !loaded.model.has_gates() {
        bail!("policy gate needs gates, and {} has none; give --gates FILE, or another --policy", args.model);
    }
    for &policy in &args.policy {
        device::require_routable(&device, &loaded.model.config, policy)?;
    }
    let routing = RoutingConfig { gate_temperature: 0.0, ..loaded.routing.unwrap_or_default() };
    let mut budgets = args.budget.clone();
    budgets.sort_unstable();
    budgets.dedup();
    for &budget in &budgets {
        routing.with_kv_budget(budget)?;
        ensure!(budget < args.context, "--budget {budget} keeps everything of a window of {} tokens", args.context);
    }
    let domains = held_out_domains(&loaded, &args.text)?;
    let texts: Vec<_> =
        domains.iter().map(|(name, documents)| (name, held_windows(documents, args.context, args.windows, args.seed))).collect();
    for (name, windows) in &texts {
        ensure!(!windows.is_empty(), "{name} has no document of {} tokens; give a longer text or a smaller --context", args.context);
    }
    let model = loaded.model.clone().to(&device);
    let comparison = Comparison { routing, budgets, policies: args.policy.clone() };
    let measured = Measured::new(args.out.join("measured"), &model);
    let bar = progress::bar((texts.iter().map(|(_, w)| w.len()).sum::<usize>() * comparison.cells().len()) as u64, "passes");
    let mut report = Report::new(
        format!("Quality against budget of {}", args.model),
        RunSummary {
            model: loaded.checkpoint.path.display().to_string(),
            n_params: Some(loaded.model.config.n_params() as u64),
            routing: Some(routing),
            data: texts.iter().map(|(name, _)| (*name).clone()).collect(),
            seed: Some(args.seed),
            cpu: device.gpu().map_or_else(cpu_name, |gpu| format!("{gpu:?}, {}", gpu.precision().name())),
            versions: vec![("sluice".into(), env!("CARGO_PKG_VERSION").into())],
            command: command(),
            ..RunSummary::default()
        },
    );
    for (name, windows) in &texts {
        let mut table = quality_table(&model, name, windows, &comparison, &measured, || bar.inc(1))?;
        // Nobody knows here what the gates were trained on.
        table.held_out = false;
        report.quality.push(table);
    }
    bar.finish_and_clear();
    report.write(&args.out)?;
    if args.json {
        println!("{}", report.to_json());
    } else {
        println!("{}", report.to_markdown());
    }
    eprintln!("report  {}", args.out.join("report.html").display());
    Ok(())
}
