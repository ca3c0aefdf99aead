//! `sluice bench decode` and `sluice bench prefill`: speed and memory of the int8 engine by context.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sluice_engine::{Engine, Sequence};
use sluice_kernels::int8_linear::InstructionSet;

use crate::commands::devices::cpu_name;
use crate::generation::{artifact_folder, open_artifact};
use crate::models::RoutingArgs;
use crate::progress::{bytes, grouped};

/// Tokens on which the engine is checked against its plain inner loops before anything is timed.
const CHECKED: usize = 40;

/// Arguments of both.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Artifact made by `sluice quantize`
    #[arg(long)]
    model: String,
    /// Contexts in tokens
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [512, 2048, 8192])]
    context: Vec<usize>,
    /// Text to read, repeated as often as needed [default: the embedded held-out prose]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens decoded at each context; the median counts
    #[arg(long, value_name = "N", default_value_t = 64)]
    tokens: usize,
    /// Inner loops of the int8 products, for comparisons [default: the fastest of this machine]
    #[arg(long, value_name = "NAME", value_parser = instruction_set)]
    instructions: Option<InstructionSet>,
    #[command(flatten)]
    routing: RoutingArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is timed.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Pass {
    /// Single tokens behind a text that grows from context to context.
    Decode,
    /// The text itself, from an empty cache for each context.
    Prefill,
}

pub(crate) fn run(args: &Args, pass: Pass) -> Result<()> {
    let Some(folder) = artifact_folder(&args.model) else {
        bail!("{} is no artifact; make one with `sluice quantize --model MODEL --out DIR`", args.model);
    };
    ensure!(args.tokens > 0 && args.context.iter().all(|&n| n > 0), "--tokens and --context start at 1");
    let (mut engine, tokenizer) = open_artifact(&folder, &args.routing, false, 1)?;
    if let Some(instructions) = args.instructions {
        engine.set_instructions(instructions)?;
    }
    let text = match &args.text {
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("cannot read {} as UTF-8 text", path.display()))?,
        None => {
            let held = |d: &sluice_data::Document| d.split == sluice_data::Split::Held && d.domain == "prose";
            sluice_data::embedded::documents().into_iter().find(held).context("no held-out prose is embedded")?.text
        }
    };
    let ids = tokenizer.encode(&text);
    ensure!(!ids.is_empty(), "the text has no tokens");
    verify(&mut engine, &ids)?;
    let limit = passes_per_second(&mut engine);
    let mut contexts = args.context.clone();
    contexts.sort_unstable();
    let mut rows = Vec::new();
    let mut sequence = engine.new_sequence();
    for &context in &contexts {
        if pass == Pass::Prefill {
            sequence = engine.new_sequence();
        }
        let fresh: Vec<u32> = (sequence.position()..context).map(|i| ids[i % ids.len()]).collect();
        let started = Instant::now();
        if !fresh.is_empty() {
            engine.extend(&mut sequence, &fresh)?;
        }
        let prefill = fresh.len() as f64 / started.elapsed().as_secs_f64();
        let mut row = json!({"context": context, "cache_bytes": sequence.cache_bytes(), "resident_bytes": resident_bytes()});
        match pass {
            Pass::Prefill => row["prefill_tokens_per_second"] = json!(prefill),
            Pass::Decode => {
                // A copy, so that the next context continues the text itself.
                let speed = decode(&mut engine, &mut sequence.clone(), &ids, args.tokens)?;
                row["decode_tokens_per_second"] = json!(speed);
                row["share_of_memory_limit"] = json!(speed / limit);
            }
        }
        rows.push(row);
    }
    report(args, pass, &engine, limit, &rows);
    Ok(())
}

fn instruction_set(name: &str) -> Result<InstructionSet, String> {
    let names = || InstructionSet::ALL.map(InstructionSet::name).join(", ");
    InstructionSet::ALL.into_iter().find(|set| set.name() == name).ok_or_else(|| format!("expected one of {}", names()))
}

/// Median tokens per second of single steps; the tokens are those of the text, since speed does not depend on them.
fn decode(engine: &mut Engine, sequence: &mut Sequence, ids: &[u32], n: usize) -> Result<f64> {
    let mut seconds = Vec::with_capacity(n);
    for i in 0..n + 4 {
        let token = ids[sequence.position() % ids.len()];
        let started = Instant::now();
        engine.extend(sequence, &[token])?;
        if i >= 4 {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    Ok(1.0 / seconds[n / 2])
}

/// The fast inner loops against the plain ones, and prefill against single steps, before anything is timed.
fn verify(engine: &mut Engine, ids: &[u32]) -> Result<()> {
    let (best, n) = (engine.instructions(), ids.len().min(CHECKED));
    let mut sequence = engine.new_sequence();
    let want = engine.extend(&mut sequence, &ids[..n])?.to_vec();
    let mut one_by_one = engine.new_sequence();
    for &id in &ids[..n - 1] {
        engine.extend(&mut one_by_one, &[id])?;
    }
    ensure!(engine.extend(&mut one_by_one, &ids[n - 1..n])? == want, "decode disagrees with prefill");
    engine.set_instructions(InstructionSet::Plain)?;
    let plain = engine.extend(&mut engine.new_sequence(), &ids[..n])?.to_vec();
    engine.set_instructions(best)?;
    ensure!(plain == want, "{} disagrees with the plain inner loops", best.name());
    Ok(())
}

/// How often a second the weights can be read by all threads, which no decoder can beat: best of seven.
fn passes_per_second(engine: &mut Engine) -> f64 {
    let mut fastest = f64::INFINITY;
    for _ in 0..7 {
        let started = Instant::now();
        std::hint::black_box(engine.read_weights());
        fastest = fastest.min(started.elapsed().as_secs_f64());
    }
    1.0 / fastest
}

fn report(args: &Args, pass: Pass, engine: &Engine, limit: f64, rows: &[Value]) {
    let (routing, weights) = (engine.routing(), engine.artifact().weight_bytes());
    if args.json {
        let report = json!({
            "engine": "sluice", "pass": if pass == Pass::Decode { "decode" } else { "prefill" }, "cpu": cpu_name(),
            "threads": engine.threads(), "instructions": engine.instructions().name(), "weight_bytes": weights, "routing": routing,
            "memory_limit_tokens_per_second": limit, "rows": rows,
        });
        println!("{report}");
        return;
    }
    println!(
        "{}, {} threads, {}; window {}, top_k {}, route_every {}",
        cpu_name(),
        engine.threads(),
        engine.instructions().name(),
        routing.window,
        routing.top_k,
        routing.route_every
    );
    let gigabytes = limit * weights as f64 / 1e9;
    println!("weights {}, read {limit:.1} times a second at {gigabytes:.1} GB/s", bytes(weights as u64));
    println!("{:>10}  {:>12}  {:>14}  {:>10}  {:>10}", "context", "tokens/s", "of the limit", "cache", "resident");
    for row in rows {
        let number = |key: &str| row[key].as_u64().unwrap_or(0);
        let speed = row["decode_tokens_per_second"].as_f64().or(row["prefill_tokens_per_second"].as_f64()).unwrap_or(f64::NAN);
        let share = row["share_of_memory_limit"].as_f64().map_or(String::new(), |share| format!("{:.0} %", 100.0 * share));
        let (cache, resident) = (bytes(number("cache_bytes")), bytes(number("resident_bytes")));
        println!("{:>10}  {speed:>12.1}  {share:>14}  {cache:>10}  {resident:>10}", grouped(number("context")));
    }
}

/// Memory that the process holds now, where the system tells; 0 elsewhere.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}
