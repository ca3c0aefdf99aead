//! `sluice bench`: speed and memory, measured. A benchmark checks its result before it prints a figure.

mod attention;
mod bert;
mod engine;
mod floor;
mod train_config;
mod train_memory;
mod train_step;

use anyhow::Result;

use engine::Pass;

/// What to measure.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Dense and routed attention by context: time, peak memory, fitted exponent
    Attention(attention::Args),
    /// Tokens per second of a training step of a decoder, dense or routed
    TrainStep(train_step::Args),
    /// Peak memory of a training step with and without checkpoints, beside the cost model
    TrainMemory(train_memory::Args),
    /// Samples per second of an encoder of the shape of BERT-large
    Bert(bert::Args),
    /// Single tokens of an int8 artifact by context, beside the memory limit
    Decode(engine::Args),
    /// Prompts of an int8 artifact by context
    Prefill(engine::Args),
}

pub(crate) fn run(command: &Command) -> Result<()> {
    match command {
        Command::Attention(args) => attention::run(args),
        Command::TrainStep(args) => train_step::run(args),
        Command::TrainMemory(args) => train_memory::run(args),
        Command::Bert(args) => bert::run(args),
        Command::Decode(args) => engine::run(args, Pass::Decode),
        Command::Prefill(args) => engine::run(args, Pass::Prefill),
    }
}
