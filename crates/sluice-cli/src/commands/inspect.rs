//! `sluice inspect`: what a model is made of and what its cache costs, dense and routed.

use anyhow::Result;
use serde_json::json;
use sluice_model::cost;

use crate::models::{self, RoutingArgs};
use crate::progress::{bytes, grouped};

/// Contexts of the table.
const CONTEXTS: [usize; 6] = [1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];

/// Arguments of `sluice inspect`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face folder, pulled model or `tiny`
    model: String,
    #[command(flatten)]
    routing: RoutingArgs,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let loaded = models::load(&args.model, args.routing.gates.as_deref())?;
    let routing = args.routing.routing(loaded.routing)?;
    let config = &loaded.model.config;
    let rows: Vec<_> = CONTEXTS.iter().map(|&n| (cost::dense(config, n), cost::routed(config, &routing, n))).collect();
    let params = loaded.model.params();
    let n_params: usize = params.iter().map(|p| p.value.len()).sum();
    if args.json {
        let tensors: Vec<_> = params.iter().map(|p| json!({"name": p.name, "shape": p.value.shape()})).collect();
        let cost: Vec<_> = rows.iter().map(|(dense, routed)| json!({"context": dense.context, "dense": dense, "routed": routed})).collect();
        let report = json!({
            "config": config, "routing": routing, "parameters": n_params, "has_gates": loaded.model.has_gates(),
            "cached_keys": routing.cached_keys(), "cost": cost, "tensors": tensors,
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    println!("{}", loaded.checkpoint.path.display());
    println!("architecture   {}, {} layers, width {}, MLP {}", config.architecture.name(), config.n_layers, config.d_model, config.d_ff);
    println!("attention      {} query heads, {} KV heads of {}", config.n_heads, config.n_kv_heads, config.head_dim);
    println!("vocabulary     {}{}", grouped(config.vocab_size as u64), if config.tie_embeddings { ", tied" } else { "" });
    println!("context        {}", grouped(config.max_seq_len as u64));
    println!("parameters     {}", grouped(n_params as u64));
    println!("gates          {}", if loaded.model.has_gates() { "yes" } else { "none" });
    println!(
        "routing        window {}, top_k {}, route_every {}: {} keys cached",
        routing.window,
        routing.top_k,
        routing.route_every,
        routing.cached_keys()
    );
    println!("\n{:>10}  {:>12} {:>12}  {:>16} {:>16}", "context", "cache dense", "cache routed", "attention dense", "attention routed");
    for (dense, routed) in &rows {
        println!(
            "{:>10}  {:>12} {:>12}  {:>9.1} GFLOP {:>9.1} GFLOP",
            grouped(dense.context as u64),
            bytes(dense.cache_bytes),
            bytes(routed.cache_bytes),
            dense.attention_flops as f64 / 1e9,
            routed.attention_flops as f64 / 1e9
        );
    }
    if args.tensors {
        println!();
        for p in params {
            println!("{:<48} {:?}", p.name, p.value.shape());
        }
    }
    Ok(())
}
