//! `sluice eval`: held-out loss and retrieval under a routing policy.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use sluice_eval::nll::{Nll, window_nll};

use super::{eval_quality, needle};
use crate::device::{self, DeviceArgs};
use crate::models::{self, RoutingArgs};
use crate::progress;

/// What to evaluate.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Mean loss of a text, in windows that are scored on their own
    Nll(NllArgs),
    /// Retrieval of facts planted at depths of a long text
    Needle(needle::Args),
    /// Loss above dense attention at several budgets, policy by policy
    Quality(eval_quality::Args),
}

/// Arguments of `sluice eval nll`.
#[derive(clap::Args)]
pub(crate) struct NllArgs {
    /// GGUF file, Hugging Face folder, pulled model or `tiny`
    #[arg(long)]
    model: String,
    /// UTF-8 text
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens per window
    #[arg(long, value_name = "N", default_value_t = 2048)]
    context: usize,
    /// Score at most this many windows [default: the whole text]
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// First token of each window that is scored
    #[arg(long, value_name = "N", default_value_t = 1)]
    positions_from: usize,
    #[command(flatten)]
    routing: RoutingArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// List the loss of every token, and the windows' token ids
    #[arg(long)]
    per_token: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: &Command) -> Result<()> {
    match command {
        Command::Nll(args) => nll(args),
        Command::Needle(args) => needle::run(args),
        Command::Quality(args) => eval_quality::run(args),
    }
}

fn nll(args: &NllArgs) -> Result<()> {
    ensure!(args.context >= 2, "--context is {}; a window needs at least 2 tokens to score one", args.context);
    ensure!(args.positions_from >= 1, "--positions-from is 0; the first token of a window has nothing to be predicted from");
    let device = args.device.open()?;
    let mut loaded = models::load(&args.model, args.routing.gates.as_deref())?;
    let plan = args.routing.plan(&loaded)?;
    device::require_routable(&device, &loaded.model.config, plan.policy)?;
    loaded.model = loaded.model.to(&device);
    let text = std::fs::read_to_string(&args.text).with_context(|| format!("cannot read {} as UTF-8 text", args.text.display()))?;
    let ids = loaded.tokenizer.encode(&text);
    let windows: Vec<Vec<u32>> = ids
        .chunks(args.context)
        .take(args.windows.unwrap_or(usize::MAX))
        .filter(|w| w.len() > args.positions_from)
        .map(<[u32]>::to_vec)
        .collect();
    ensure!(
        !windows.is_empty(),
        "{} has {} tokens, and none past position {} of a window; give a longer text or a smaller --positions-from",
        args.text.display(),
        ids.len(),
        args.positions_from
    );
    let bar = progress::bar(windows.iter().map(|w| w.len() as u64).sum(), "tokens");
    let (mut scored, mut bytes) = (Vec::with_capacity(windows.len()), 0);
    for window in &windows {
        scored.push(window_nll(&loaded.model, window, &plan, args.positions_from));
        bytes += loaded.tokenizer.decode(&window[args.positions_from..]).len();
        bar.inc(window.len() as u64);
    }
    bar.finish_and_clear();
    let mut result = Nll::summarise(&scored, bytes, args.positions_from);
    if args.per_token {
        result.per_token = Some(scored.iter().flat_map(|w| &w.nll).copied().collect());
        result.token_ids = Some(windows);
    }
    if args.json {
        println!("{}", serde_json::to_string(&result)?);
    } else {
        let Nll { tokens, nll, bits_per_byte, top1, .. } = &result;
        println!("policy          {}", plan.policy.name());
        println!("tokens scored   {}", progress::grouped(*tokens as u64));
        println!("loss            {nll:.4} nats per token");
        println!("bits per byte   {bits_per_byte:.4}");
        println!("first choice    {:.1} %", 100.0 * top1);
        for (i, x) in result.per_token.iter().flatten().enumerate() {
            println!("{i}\t{x:.5}");
        }
    }
    Ok(())
}
