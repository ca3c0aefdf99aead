//! The binary `sluice`: parses the command line, wires the crates together, draws progress bars and prints.
//! The only crate that reads the environment. People get tables, programs get `--json`.
#![expect(clippy::print_stdout, reason = "printing is what the command line is for")]

mod commands;
mod device;
mod distill_data;
mod distill_report;
mod generation;
mod models;
mod progress;
mod quantise;
mod sampling;
mod sentences;
mod training_data;

use clap::{Parser, Subcommand};
use sluice_tensor::cuda::CudaError;

/// Turn a dense language model into a routed one whose KV cache stays constant, however long the text.
#[derive(Parser)]
#[command(version, propagate_version = true, after_help = "Start with `sluice distill`: it needs no files and takes about three minutes.")]
struct Cli {
    /// Threads to compute with [default: all cores]
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Distil a dense model into a routed one and report quality against budget
    Distill(commands::distill::Args),
    /// Train a dense model from random weights
    Train(commands::train::Args),
    /// Evaluate a model under a routing policy
    #[command(subcommand)]
    Eval(commands::eval::Command),
    /// Make a vector of every line of a text
    Embed(commands::embed::Args),
    /// Round a model to int8 for the engine
    Quantize(commands::quantize::Args),
    /// Continue a text
    Generate(commands::generate::Args),
    /// Talk to a chat model
    Chat(commands::chat::Args),
    /// Answer OpenAI-compatible HTTP requests with an artifact, and serve a chat page
    Serve(commands::serve::Args),
    /// Download a model
    Pull(commands::pull::Args),
    /// Measure speed and memory
    #[command(subcommand)]
    Bench(commands::bench::Command),
    /// Print a model's config, tensors and cost by context
    Inspect(commands::inspect::Args),
    /// Check every op of a device against its specification
    Selftest(commands::selftest::Args),
    /// Print what this machine can compute with
    Devices(commands::devices::Args),
}

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    let done = std::panic::catch_unwind(|| run(cli)).unwrap_or_else(|payload| match payload.downcast::<CudaError>() {
        // Ops on a GPU raise what they cannot return; any other panic has been reported and goes its way.
        Ok(error) => Err((*error).into()),
        Err(payload) => std::panic::resume_unwind(payload),
    });
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if let Some(threads) = cli.threads {
        anyhow::ensure!(threads > 0, "--threads is 0; expected at least 1");
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    match cli.command {
        Command::Distill(args) => commands::distill::run(&args),
        Command::Train(args) => commands::train::run(&args),
        Command::Eval(command) => commands::eval::run(&command),
        Command::Embed(args) => commands::embed::run(&args),
        Command::Quantize(args) => commands::quantize::run(&args),
        Command::Generate(args) => commands::generate::run(&args),
        Command::Chat(args) => commands::chat::run(&args),
        Command::Serve(args) => commands::serve::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Pull(args) => commands::pull::run(&args),
        Command::Bench(command) => commands::bench::run(&command),
        Command::Selftest(args) => commands::selftest::run(&args),
        Command::Devices(args) => commands::devices::run(&args),
    }
}
