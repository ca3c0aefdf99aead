//! `sluice bench train-memory`: peak bytes of a training step with checkpoints off and on, measured beside predicted.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::json;
use sluice_model::train_memory::{self, TrainMemory};
use sluice_tensor::memory;

use super::train_config::Setup;
use crate::commands::devices::cpu_name;
use crate::progress::grouped;

/// Arguments of `sluice bench train-memory`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Decoders and contexts to measure, as NAME or NAME:TOKENS; names as in `bench train-step`
    #[arg(long, value_name = "CONFIG", num_args = 1.., default_values = ["tiny", "tiny:4096", "135m", "135m:2048"])]
    config: Vec<String>,
    /// Write the figures to FILE.json and the table to FILE.md
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    config: String,
    measured_peak_bytes: u64,
    /// Measured over predicted.
    ratio: f64,
    predicted: TrainMemory,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut rows = Vec::new();
    for name in &args.config {
        let (config, context) = match name.split_once(':') {
            None => (name.as_str(), None),
            Some((config, tokens)) => match tokens.parse() {
                Ok(tokens) => (config, Some(tokens)),
                Err(_) => bail!("--config {name}: `{tokens}` is not a number of tokens"),
            },
        };
        let setup = Setup::named(config, context)?;
        for checkpoint in [false, true] {
            let predicted =
                train_memory::dense(&setup.model, setup.batch, setup.context, if checkpoint { setup.model.n_layers } else { 0 });
            let measured_peak_bytes = measure(&setup, checkpoint)?;
            let ratio = measured_peak_bytes as f64 / predicted.peak_bytes as f64;
            rows.push(Row { config: config.to_string(), measured_peak_bytes, ratio, predicted });
        }
    }
    let json = json!({
        "what": "peak bytes of tensors and kernel scratch in one training step (forward, full backward, AdamW, f32), counted against measured",
        "command": format!("sluice {}", std::env::args().skip(1).collect::<Vec<_>>().join(" ")), "cpu": cpu_name(), "threads": rayon::current_num_threads(), "rows": rows,
    });
    if let Some(path) = &args.out {
        for (extension, text) in [("json", serde_json::to_string_pretty(&json)? + "\n"), ("md", table(&rows))] {
            let path = path.with_added_extension(extension);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    if args.json {
        println!("{json}");
    } else {
        print!("{}", table(&rows));
    }
    Ok(())
}

/// Peak of a step after the first, which allocates the moments.
fn measure(setup: &Setup, checkpoint: bool) -> Result<u64> {
    let before = memory::current_bytes();
    let (mut trainer, data) = (setup.trainer(checkpoint), setup.tokens());
    trainer.step(&data)?;
    memory::reset_peak();
    trainer.step(&data)?;
    Ok((memory::peak_bytes() - before) as u64)
}

/// Mebibytes, one unit for all rows: what checkpoints save shows in the last digits beside the weights.
fn mib(bytes: u64) -> String {
    format!("{} MiB", grouped((bytes as f64 / (1 << 20) as f64).round() as u64))
}

/// A table in markdown.
fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| decoder | tokens | checkpoint | weights, gradients, moments | activations kept | of one layer | logits at a time | peak predicted | peak measured | measured / predicted |\n\
         |---|---:|---|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for Row { config, measured_peak_bytes, ratio, predicted: p } in rows {
        writeln!(
            text,
            "| {config} | {} x {} | {} | {} | {} | {} | {} | {} | {} | {ratio:.3} |",
            p.batch,
            grouped(p.context as u64),
            if p.recompute > 0 { "on" } else { "off" },
            mib(p.parameter_bytes + p.gradient_bytes + p.moment_bytes),
            mib(p.saved_bytes),
            mib(p.layer.iter().map(|op| op.bytes).sum()),
            mib(p.head_chunk_bytes),
            mib(p.peak_bytes),
            mib(*measured_peak_bytes),
        )
        .expect("writing to a string");
    }
    text
}
