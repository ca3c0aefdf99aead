//! `sluice train`: a dense model from random weights, on the embedded texts and generated recall documents.

use std::path::PathBuf;

use anyhow::{Context, Result};
use sluice_tensor::Device;
use sluice_train::pretrain::{Pretrainer, TrainConfig, TrainStep};

use crate::device::{DeviceArgs, MemoryArgs};
use crate::progress;
use crate::training_data::TrainingData;

/// Arguments of `sluice train`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// TOML recipe
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Folder of the run
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Continue where the run in --out was interrupted
    #[arg(long)]
    resume: bool,
    /// Print what the run would take and stop
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Save every N steps
    #[arg(long, value_name = "N", default_value_t = 100)]
    save_every: u64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let text = std::fs::read_to_string(&args.config).with_context(|| format!("cannot read {}", args.config.display()))?;
    let config = TrainConfig::from_toml(&text).with_context(|| args.config.display().to_string())?;
    let data = TrainingData::new(&config)?;
    let tokens: u64 = config.phases.iter().map(|p| p.steps * (p.context * p.batch) as u64).sum();
    eprintln!(
        "{} parameters, {} steps, {} tokens; text of {} tokens",
        progress::grouped(config.model.n_params() as u64),
        progress::grouped(config.steps()),
        progress::grouped(tokens),
        progress::grouped(data.text_tokens())
    );
    if args.dry_run {
        return Ok(());
    }
    let state = args.out.join("state.safetensors");
    let log = args.out.join("train.jsonl");
    let device = args.device.open()?;
    let mut trainer = Pretrainer::new(config).to(&device);
    if let Some(budget) = args.memory.budget(&device)? {
        let counted = trainer.fit_memory(budget)?;
        let (again, layers) = (trainer.recompute, trainer.config.model.n_layers);
        eprintln!("memory: a step holds {} of {}; {again} of {layers} layers run again", progress::bytes(counted), progress::bytes(budget));
    }
    if args.resume && trainer.resume(&state)? {
        eprintln!("continuing at step {}", trainer.step);
    }
    let mut lines = read_log(&log, trainer.step);
    let steps = trainer.config.steps();
    let bar = progress::bar(steps, "steps");
    while trainer.step < steps {
        let batch = data.batch(&trainer.config, trainer.step);
        let report = trainer.step(&batch)?;
        bar.set_position(trainer.step);
        bar.set_message(shown(&report));
        if report.step.is_multiple_of(20) {
            lines.push(serde_json::to_string(&report)?);
        }
        if bar.is_hidden() && report.step.is_multiple_of(50) {
            eprintln!("step {:>6}  {}", report.step, shown(&report));
        }
        if trainer.step.is_multiple_of(args.save_every) || trainer.step == steps {
            trainer.save(&state)?;
            sluice_train::snapshot::write_atomically(&log, (lines.join("\n") + "\n").as_bytes())?;
        }
    }
    bar.finish_and_clear();
    trainer.model = trainer.model.to(&Device::Cpu);
    data.export(&trainer.model, &args.out)?;
    println!("{}", args.out.display());
    Ok(())
}

fn shown(report: &TrainStep) -> String {
    let speed = report.tokens as f64 / report.seconds;
    let answers = report.answer_loss.map_or(String::new(), |a| format!(", answers {a:.3}"));
    format!("loss {:.3}{answers}, {:.0} tokens/s", report.loss, speed)
}

/// Lines of an interrupted run up to the step it continues at.
fn read_log(path: &std::path::Path, step: u64) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let before = |line: &&str| serde_json::from_str::<TrainStep>(line).is_ok_and(|r| r.step < step);
    text.lines().filter(before).map(str::to_string).collect()
}
