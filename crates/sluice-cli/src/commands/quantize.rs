//! `sluice quantize`: a float model, with or without gates, as an int8 artifact for the engine.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use serde_json::json;
use sluice_model::Policy;
use sluice_spec::artifact::Quality;

use crate::models::{self, RoutingArgs};
use crate::progress::bytes;
use crate::quantise;

/// Arguments of `sluice quantize`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face folder, pulled model or `tiny`
    #[arg(long)]
    model: String,
    /// New folder for the artifact
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Inputs that share a scale: 32 or 64
    #[arg(long, value_name = "N", default_value_t = 32)]
    group: usize,
    #[command(flatten)]
    routing: RoutingArgs,
    /// Tokens of a held-out text on which int8 is compared with the float model; 0 skips that
    #[arg(long, value_name = "N", default_value_t = 2048)]
    quality_tokens: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!([32, 64].contains(&args.group), "--group is {}; expected 32 or 64", args.group);
    ensure!(!args.out.exists(), "{} exists already; remove it or choose another --out", args.out.display());
    let loaded = models::load(&args.model, args.routing.gates.as_deref())?;
    let routing = args.routing.routing(loaded.routing)?;
    let gates = match args.routing.policy {
        Some(Policy::Streaming) => None,
        None => loaded.checkpoint.gates.as_ref(),
        Some(Policy::Gate) if loaded.checkpoint.gates.is_some() => loaded.checkpoint.gates.as_ref(),
        Some(Policy::Gate) => bail!("policy gate needs gates; give --gates FILE or make them with `sluice distill`"),
        Some(other) => bail!("policy {} cannot run in the engine; choose gate or streaming", other.name()),
    };
    let provenance = quantise::provenance(&loaded, args.routing.gates.as_deref())?;
    let mut artifact = quantise::quantise(&loaded, gates, routing, args.group, provenance)?;
    if args.quality_tokens > 0 {
        artifact = quantise::measure(artifact, &loaded, args.quality_tokens)?;
    }
    artifact.write(&args.out)?;
    let quality = artifact.manifest.quality.as_ref();
    if args.json {
        println!(
            "{}",
            json!({"out": args.out, "bytes": artifact.weight_bytes(), "group": args.group, "gates": gates.is_some(), "quality": quality})
        );
        return Ok(());
    }
    println!("{}", args.out.display());
    println!("weights         {}, int8 in groups of {}", bytes(artifact.weight_bytes() as u64), args.group);
    println!("routing         {}", if gates.is_some() { "trained gates" } else { "no gates: sinks and the most recent keys" });
    if let Some(Quality { text, tokens, kl, top1_agreement, nll_difference, routing_overlap, nll_difference_replayed }) = quality {
        println!("against float   {tokens} tokens of {text}, same gates and routing");
        println!("  KL            {kl:.5} nats");
        println!("  first choice  {:.2} % the same", 100.0 * top1_agreement);
        println!("  loss          {nll_difference:+.5} nats per token");
        println!("  kept keys     {:.2} % the same (Jaccard)", 100.0 * routing_overlap);
        if let Some(replayed) = nll_difference_replayed {
            println!("  loss          {replayed:+.5} nats per token with the keys that the float model keeps");
        }
    }
    Ok(())
}
