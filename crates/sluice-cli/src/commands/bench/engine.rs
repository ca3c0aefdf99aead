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
/// Single steps of a context before the next one has its turn.
const WINDOW: usize = 8;

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
    /// Tokens decoded at each context, in windows of 8 that take turns; medians count
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
    let mut contexts = args.context.clone();
    contexts.sort_unstable();
    let (limit, rows) = match pass {
        Pass::Decode => decode(&mut engine, &ids, &contexts, args.tokens)?,
        Pass::Prefill => (passes_per_second(&mut engine), prefill(&mut engine, &ids, &contexts)?),
    };
    report(args, pass, &engine, limit, &rows);
    Ok(())
}

fn instruction_set(name: &str) -> Result<InstructionSet, String> {
    let names = || InstructionSet::ALL.map(InstructionSet::name).join(", ");
    InstructionSet::ALL.into_iter().find(|set| set.name() == name).ok_or_else(|| format!("expected one of {}", names()))
}

/// Read a text of each length, from an empty cache.
fn prefill(engine: &mut Engine, ids: &[u32], contexts: &[usize]) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    for &context in contexts {
        let mut sequence = engine.new_sequence();
        let seconds = read_up_to(engine, &mut sequence, ids, context)?;
        let mut row = row(&sequence, context);
        row["prefill_tokens_per_second"] = json!(context as f64 / seconds);
        rows.push(row);
    }
    Ok(rows)
}

/// Single steps behind one text, whose state is put aside at each context. Then the contexts and the memory limit take turns in short
/// windows, so that what else the machine does hits them alike; medians over the windows count. Returns the limit and a row a context.
fn decode(engine: &mut Engine, ids: &[u32], contexts: &[usize], n_tokens: usize) -> Result<(f64, Vec<Value>)> {
    let mut text = engine.new_sequence();
    // In memory from the start, so that the resident size shows what the text adds.
    let mut states: Vec<Sequence> = contexts.iter().map(|_| text.clone()).collect();
    let mut running = text.clone();
    let mut rows = Vec::new();
    for (state, &context) in states.iter_mut().zip(contexts) {
        read_up_to(engine, &mut text, ids, context)?;
        state.copy_from(&text);
        rows.push(row(&text, context));
    }
    let windows = n_tokens.div_ceil(WINDOW);
    let (mut limits, mut speeds) = (Vec::new(), vec![Vec::new(); contexts.len()]);
    for window in 0..windows {
        limits.push(passes_per_second(engine));
        for i in 0..contexts.len() {
            // Every other window backwards: nobody always comes first.
            let i = if window % 2 == 0 { i } else { contexts.len() - 1 - i };
            running.copy_from(&states[i]);
            speeds[i].push(steps(engine, &mut running, ids, WINDOW)?);
        }
    }
    for (row, speeds) in rows.iter_mut().zip(&speeds) {
        row["decode_tokens_per_second"] = json!(median(speeds.clone()));
        row["share_of_memory_limit"] = json!(median(speeds.iter().zip(&limits).map(|(speed, limit)| speed / limit).collect()));
        row["windows_tokens_per_second"] = json!(speeds);
    }
    Ok((median(limits), rows))
}

/// Continue a text to a length; returns the seconds that took.
fn read_up_to(engine: &mut Engine, sequence: &mut Sequence, ids: &[u32], context: usize) -> Result<f64> {
    let fresh: Vec<u32> = (sequence.position()..context).map(|i| ids[i % ids.len()]).collect();
    let started = Instant::now();
    if !fresh.is_empty() {
        engine.extend(sequence, &fresh)?;
    }
    Ok(started.elapsed().as_secs_f64())
}

fn row(sequence: &Sequence, context: usize) -> Value {
    json!({"context": context, "cache_bytes": sequence.cache_bytes(), "resident_bytes": resident_bytes()})
}

/// Median tokens per second of single steps; the tokens are those of the text, since speed does not depend on them.
fn steps(engine: &mut Engine, sequence: &mut Sequence, ids: &[u32], n: usize) -> Result<f64> {
    const WARM_UP: usize = 2;
    let mut speeds = Vec::with_capacity(n);
    for i in 0..WARM_UP + n {
        let token = ids[sequence.position() % ids.len()];
        let started = Instant::now();
        engine.extend(sequence, &[token])?;
        if i >= WARM_UP {
            speeds.push(1.0 / started.elapsed().as_secs_f64());
        }
    }
    Ok(median(speeds))
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
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

/// How often a second the weights can be read by all threads, which no decoder can beat: best of five.
fn passes_per_second(engine: &mut Engine) -> f64 {
    let mut fastest = f64::INFINITY;
    for _ in 0..5 {
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
