//! `sluice distill`: the main job. A dense model becomes a routed one; the report shows what that costs and saves.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sluice_eval::report::StepMemory;
use sluice_model::checkpoint::{export_hf, save_gates};
use sluice_model::{Policy, cost};
use sluice_spec::RoutingConfig;
use sluice_tensor::{DType, memory};
use sluice_train::distill::{Distiller, Split, StepReport};
use sluice_train::distill_config::DistillConfig;

use crate::device::{self, DeviceArgs, MemoryArgs};
use crate::distill_data::DistillData;
use crate::distill_report::{self, ReportPlan};
use crate::models::{self, TINY};
use crate::progress::{self, grouped};

/// Seconds between saved states.
const SAVE_EVERY: Duration = Duration::from_secs(20);

/// Arguments of `sluice distill`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Dense model: GGUF file, Hugging Face folder, pulled model, or `tiny`, the embedded one
    #[arg(long, value_name = "MODEL", default_value = TINY)]
    teacher: String,
    /// Larger model with the same tokenizer that gives the logits of stage 2
    #[arg(long, value_name = "MODEL")]
    logits_from: Option<String>,
    /// Folder of the run
    #[arg(long, value_name = "DIR", default_value = "out/distill")]
    out: PathBuf,
    /// TOML with other settings than the defaults
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Total budget in tokens per KV head: window and routed keys
    #[arg(long, value_name = "N")]
    budget: Option<usize>,
    /// Stages to run [default: those of the settings]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=3), num_args = 1..)]
    stage: Vec<u8>,
    /// Training texts (UTF-8, documents separated by form feeds) instead of the embedded ones
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Held-out texts for the report instead of the embedded ones
    #[arg(long, value_name = "FILE", num_args = 1..)]
    eval_text: Vec<PathBuf>,
    /// Windows of each held-out text in the report
    #[arg(long, value_name = "N")]
    eval_windows: Option<usize>,
    /// Policies that the report compares with dense attention
    #[arg(long, value_name = "POLICY", value_parser = compared_policy, num_args = 1..,
          default_values = ["gate", "streaming", "random", "h2o", "oracle"])]
    eval_policy: Vec<Policy>,
    /// Continue where the run in --out was interrupted
    #[arg(long)]
    resume: bool,
    /// Write the whole student as a Hugging Face folder, not the gates alone
    #[arg(long)]
    export_model: bool,
    /// Skip the report's measurements
    #[arg(long)]
    no_report: bool,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Print what the run would take and stop
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let started = Instant::now();
    let loaded = models::load(&args.teacher, None)?;
    let config = settings(args, loaded.model.has_gates())?;
    let teacher = args.logits_from.as_deref().map(|m| models::load(m, None)).transpose()?;
    if let Some(teacher) = &teacher {
        let (a, b) = (&loaded.tokenizer, &teacher.tokenizer);
        ensure!(
            a.vocab_size() == b.vocab_size() && a.encode("The same text, 123.") == b.encode("The same text, 123."),
            "{} and {} have different tokenizers ({} and {} tokens); distillation needs the same one",
            args.teacher,
            args.logits_from.as_deref().unwrap_or_default(),
            a.vocab_size(),
            b.vocab_size()
        );
    }
    if args.dry_run {
        return dry_run(args, &loaded.model, &config);
    }
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot create the folder {}", args.out.display()))?;
    let state = args.out.join("state.safetensors");
    if state.exists() && !args.resume {
        bail!("{} holds a run already; continue it with --resume, or give another --out", args.out.display());
    }
    let device = args.device.open()?;
    device::require_routable(&device, &loaded.model.config, Policy::Gate)?;
    let data = DistillData::new(&loaded, &args.text, &args.eval_text, config.context)?;
    eprintln!("{}", toml_of(&config)?);
    let mut distiller =
        Distiller::new(loaded.model.clone().to(&device), teacher.map(|t| t.model.to(&device)), config, data.training.clone())?;
    if let Some(budget) = args.memory.budget(&device)? {
        distiller.fit_memory(budget)?;
    }
    let counted = distiller.predicted_peak(distiller.split);
    let Split { documents, recompute } = distiller.split;
    eprintln!(
        "memory: a step through the stack holds {}; documents at a time: {documents} of {}, layers that run again: {recompute} of {}",
        progress::bytes(counted),
        distiller.config.documents_per_step,
        distiller.model.config.n_layers
    );
    if args.resume && distiller.resume(&state)? {
        let (done, all) = distiller.progress();
        eprintln!("continuing after {done} of {all} items");
    }
    let measured = work_through(&mut distiller, &state)?;
    if let Some(measured) = measured {
        let waits: u64 = distiller.reports.iter().filter(|report| report.loss.is_some()).map(|report| report.host_waits).sum();
        eprintln!("memory: a step through the stack held {}; waits of the host inside steps: {waits}", progress::bytes(measured as u64));
    }
    let step_memory = measured.map(|measured| StepMemory {
        documents_at_a_time: documents,
        recomputed_layers: recompute,
        counted_peak_bytes: counted,
        measured_peak_bytes: measured as u64,
    });

    let routing = RoutingConfig { gate_temperature: 0.0, ..distiller.config.routing };
    let note = format!("sluice distill --teacher {}, seed {}", args.teacher, distiller.config.seed);
    let gates = distiller.model.gates(routing, note).context("the student has no gates")?;
    let gate_file = args.out.join("gates.safetensors");
    save_gates(&gate_file, &gates, &distiller.model.config)?;
    if args.export_model || distiller.config.stage2.all_steps > 0 {
        let (text, json) = (loaded.tokenizer.text_config(), loaded.tokenizer.to_json());
        let folder = args.out.join("model");
        export_hf(&folder, &distiller.model.config, &distiller.model.base_tensors(), text, Some(&json), Some(&gates), DType::F32)?;
    }
    if !args.no_report {
        let windows = args.eval_windows.unwrap_or(if args.teacher == TINY { 6 } else { 2 });
        let plan = ReportPlan { windows, policies: args.eval_policy.clone(), measured: args.out.join("measured") };
        let mut report = distill_report::measure(&args.teacher, &loaded, &distiller, &data, &plan, started)?;
        report.run.step_memory = step_memory;
        report.write(&args.out)?;
        if args.json {
            println!("{}", report.to_json());
        } else {
            println!("{}", report.to_markdown());
        }
    }
    // The state is kept: it resumes to nothing, and it is the moments that a longer run would need.
    eprintln!("gates   {}", gate_file.display());
    if !args.no_report {
        eprintln!("report  {}", args.out.join("report.html").display());
    }
    Ok(())
}

/// A policy that is compared with dense attention, for clap.
pub(crate) fn compared_policy(name: &str) -> Result<Policy> {
    let of_report = Policy::parse(name).filter(|p| *p != Policy::Dense);
    of_report.with_context(|| format!("unknown policy `{name}`; expected gate, streaming, random, h2o or oracle"))
}

/// Defaults, then the file, then the options. Gates that a model has are trained further, not fitted anew, unless somebody asks.
fn settings(args: &Args, has_gates: bool) -> Result<DistillConfig> {
    let mut config = match &args.config {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            DistillConfig::from_toml(&text).with_context(|| path.display().to_string())?
        }
        None if args.teacher == TINY => DistillConfig::from_toml(include_str!("../../../../recipes/tiny-distill.toml"))?,
        None => DistillConfig::default(),
    };
    if let Some(budget) = args.budget {
        config.routing = config.routing.with_kv_budget(budget)?;
    }
    if !args.stage.is_empty() {
        config.keep_stages(&args.stage);
    } else if has_gates && args.config.is_none() {
        eprintln!("the model has gates, from which this run goes on; --stage 0 .. would fit new ones");
        config.keep_stages(&[1, 2, 3]);
    }
    config.validate()?;
    Ok(config)
}

/// Do what is left of the plan. Gives back the largest number of bytes that steps through the stack held on their device, if there were any.
fn work_through(distiller: &mut Distiller, state: &std::path::Path) -> Result<Option<usize>> {
    let (done, all) = distiller.progress();
    let bar = progress::bar(all as u64, "items");
    bar.set_position(done as u64);
    let device = distiller.model.device();
    let (mut saved, mut is_measuring) = (Instant::now(), false);
    while let Some(work) = distiller.next_work() {
        if work.passes_through_the_stack() && !is_measuring {
            is_measuring = true;
            device.gpu().map_or_else(memory::reset_peak, |gpu| gpu.reset_peak());
        }
        let Some(report) = distiller.step()? else { break };
        bar.inc(1);
        bar.set_message(shown(&report));
        if bar.is_hidden() {
            let (done, all) = distiller.progress();
            eprintln!("{done}/{all}  {}", shown(&report));
        }
        if saved.elapsed() > SAVE_EVERY || distiller.next_work().is_none() {
            distiller.save(state)?;
            saved = Instant::now();
        }
    }
    bar.finish_and_clear();
    Ok(is_measuring.then(|| device.gpu().map_or_else(memory::peak_bytes, |gpu| gpu.peak_bytes())))
}

fn shown(report: &StepReport) -> String {
    let loss = report.loss.map_or(String::new(), |l| format!("loss {l:.4}, "));
    format!("{}  {loss}budget {}, {:.0} tokens/s", report.work.name(), report.kv_budget, report.tokens as f64 / report.seconds)
}

fn toml_of(config: &DistillConfig) -> Result<String> {
    Ok(toml::to_string(config)?)
}

/// Parameters, work and memory, without touching the weights.
fn dry_run(args: &Args, model: &sluice_model::Decoder, config: &DistillConfig) -> Result<()> {
    let plan = config.plan();
    let context = config.context;
    let dense = cost::dense(&model.config, context);
    let per_pass = dense.attention_flops + dense.linear_flops;
    let through_the_stack = plan.iter().filter(|w| w.stage() > 0).count() as u64;
    // A dense pass for every item; those that train also run the routed student forward and backward.
    let flops =
        plan.len() as u64 * per_pass + through_the_stack * 3 * cost::routed(&model.config, &config.routing, context).attention_flops;
    let gates = model.config.n_layers * model.config.n_kv_heads * (model.config.d_model + 2);
    let weights = 4 * model.config.n_params() as u64;
    if args.json {
        println!(
            "{}",
            serde_json::json!({"config": config, "items": plan.len(), "tokens": plan.len() * context, "parameters": model.config.n_params(),
                "gate_parameters": gates, "flops": flops, "weight_bytes": weights})
        );
    } else {
        println!("parameters        {} and {} in the gates", grouped(model.config.n_params() as u64), grouped(gates as u64));
        println!("items             {} of up to {} tokens", plan.len(), grouped(context as u64));
        println!("arithmetic        {:.1} TFLOP at least", flops as f64 / 1e12);
        println!("weights           {}", progress::bytes(weights));
        println!("time              about {:.0} minutes at 100 GFLOP/s", flops as f64 / 1e11 / 60.0);
    }
    Ok(())
}
