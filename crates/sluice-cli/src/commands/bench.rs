//! `sluice bench`: speed and memory, measured. A benchmark checks its result against the naive twin before it prints a time.

use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use sluice_kernels::routed_attention::Routing;
use sluice_kernels::top_k_routing::{self, Budget};
use sluice_kernels::{dense_attention, routed_attention};
use sluice_model::Decoder;
use sluice_spec::{Architecture, ModelConfig, RoutingConfig};
use sluice_tensor::{Tensor, memory};
use sluice_train::hash::mix;
use sluice_train::pretrain::{Batch, DataConfig, Phase, Pretrainer, TrainConfig};

use super::bench_engine::{self, Pass};
use super::devices::cpu_name;
use crate::progress::{bytes, grouped};

/// What to measure.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Dense and routed attention by context: time, peak memory, fitted exponent
    Attention(AttentionArgs),
    /// Tokens per second of a training step of a dense decoder
    TrainStep(TrainStepArgs),
    /// Single tokens of an int8 artifact by context, beside the memory limit
    Decode(bench_engine::Args),
    /// Prompts of an int8 artifact by context
    Prefill(bench_engine::Args),
}

/// Arguments of `sluice bench attention`.
#[derive(clap::Args)]
pub(crate) struct AttentionArgs {
    /// Contexts in tokens
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [1024, 2048, 4096, 8192, 16384, 32768, 65536])]
    context: Vec<usize>,
    /// Dense attention up to this context
    #[arg(long, value_name = "N", default_value_t = 16384)]
    dense_up_to: usize,
    /// Query heads, KV heads and head width
    #[arg(long, value_name = "N", num_args = 3, default_values_t = [9, 3, 64])]
    heads: Vec<usize>,
    /// Named budget: paper, edge, default or long
    #[arg(long, value_name = "NAME", default_value = "default")]
    preset: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `sluice bench train-step`.
#[derive(clap::Args)]
pub(crate) struct TrainStepArgs {
    /// `tiny` (6 layers of 128, T = 2048, B = 2) or `135m` (SmolLM2-135M, T = 512, B = 1)
    #[arg(long)]
    config: String,
    /// Steps that are timed, after one that is not
    #[arg(long, value_name = "N", default_value_t = 5)]
    steps: usize,
    /// Keep only the residual stream between layers and recompute the rest in backward
    #[arg(long)]
    checkpoint: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: &Command) -> Result<()> {
    match command {
        Command::Attention(args) => attention(args),
        Command::TrainStep(args) => train_step(args),
        Command::Decode(args) => bench_engine::run(args, Pass::Decode),
        Command::Prefill(args) => bench_engine::run(args, Pass::Prefill),
    }
}

/// Random inputs of one attention layer.
struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
}

impl Inputs {
    fn new(t: usize, heads: &[usize]) -> Self {
        let (h, g, d) = (heads[0], heads[1], heads[2]);
        let random = |seed: u64, shape: Vec<usize>| {
            let n = shape.iter().product::<usize>() as u64;
            // Sum of three uniforms, centred: close enough to normal for a benchmark.
            let uniform = |i: u64, s: u64| (mix(seed * 3 + s, i) >> 40) as f32 / (1u64 << 24) as f32;
            Tensor::from_vec((0..n).map(|i| 2.0 * (uniform(i, 0) + uniform(i, 1) + uniform(i, 2)) - 3.0).collect(), shape)
        };
        Self {
            q: random(1, vec![1, t, h, d]),
            k: random(2, vec![1, t, g, d]),
            v: random(3, vec![1, t, g, d]),
            scores: random(4, vec![1, t, g]),
        }
    }

    fn route(&self, budget: &Budget) -> Routing {
        top_k_routing::route(&self.scores, &[self.q.shape()[1]], budget)
    }
}

fn attention(args: &AttentionArgs) -> Result<()> {
    ensure!(
        args.heads.len() == 3 && args.heads[0].is_multiple_of(args.heads[1]),
        "--heads takes query heads, KV heads (a divisor) and head width"
    );
    let routing = RoutingConfig::preset(&args.preset)?;
    let budget = sluice_model::policy::budget(&routing);
    verify(&args.heads, &budget)?;
    let mut rows: Vec<Value> = Vec::new();
    for &t in &args.context {
        let inputs = Inputs::new(t, &args.heads);
        let lens = [t];
        let grad = &inputs.q;
        let mut measure = |name: &str, pass: &str, run: &dyn Fn()| {
            let (seconds, peak) = timed(run);
            rows.push(json!({"attention": name, "pass": pass, "context": t, "seconds": seconds, "peak_bytes": peak}));
        };
        if t <= args.dense_up_to {
            measure("dense", "forward", &|| drop(dense_attention::fwd(&inputs.q, &inputs.k, &inputs.v, 0, &lens)));
            measure("dense", "forward and backward", &|| {
                let (o, lse) = dense_attention::fwd(&inputs.q, &inputs.k, &inputs.v, 0, &lens);
                drop(dense_attention::bwd(grad, &inputs.q, &inputs.k, &inputs.v, &o, &lse, 0, &lens));
            });
        }
        measure("routed", "forward", &|| {
            let routing = inputs.route(&budget);
            drop(routed_attention::fwd(&inputs.q, &inputs.k, &inputs.v, None, &routing));
        });
        measure("routed", "forward and backward", &|| {
            let routing = inputs.route(&budget);
            let (o, lse) = routed_attention::fwd(&inputs.q, &inputs.k, &inputs.v, None, &routing);
            drop(routed_attention::bwd(grad, &inputs.q, &inputs.k, &inputs.v, &o, &lse, None, &routing));
        });
    }
    let exponents: Vec<Value> = ["dense", "routed"]
        .iter()
        .flat_map(|name| ["forward", "forward and backward"].map(|pass| (*name, pass)))
        .filter_map(|(name, pass)| {
            let of = |row: &&Value| row["attention"] == name && row["pass"] == pass;
            let points: Vec<(f64, f64)> =
                rows.iter().filter(of).filter_map(|r| Some((r["context"].as_f64()?.ln(), r["seconds"].as_f64()?.ln()))).collect();
            Some(json!({"attention": name, "pass": pass, "exponent": slope(&points)?}))
        })
        .collect();
    if args.json {
        println!(
            "{}",
            json!({"cpu": cpu_name(), "threads": rayon::current_num_threads(), "heads": args.heads, "routing": routing, "rows": rows, "exponents": exponents})
        );
        return Ok(());
    }
    println!(
        "{}, {} threads, heads {:?}, window {}, top_k {}, route_every {}",
        cpu_name(),
        rayon::current_num_threads(),
        args.heads,
        routing.window,
        routing.top_k,
        routing.route_every
    );
    println!("{:<8} {:<22} {:>9} {:>12} {:>12}", "", "pass", "context", "time", "peak memory");
    for row in &rows {
        println!(
            "{:<8} {:<22} {:>9} {:>9.1} ms {:>12}",
            row["attention"].as_str().unwrap_or_default(),
            row["pass"].as_str().unwrap_or_default(),
            grouped(row["context"].as_u64().unwrap_or(0)),
            1e3 * row["seconds"].as_f64().unwrap_or(f64::NAN),
            bytes(row["peak_bytes"].as_u64().unwrap_or(0))
        );
    }
    for e in exponents {
        println!(
            "time of {} {} grows with context to the power {:.2}",
            e["attention"].as_str().unwrap_or_default(),
            e["pass"].as_str().unwrap_or_default(),
            e["exponent"].as_f64().unwrap_or(f64::NAN)
        );
    }
    Ok(())
}

/// Both kernels against their naive twins, before anything is timed.
fn verify(heads: &[usize], budget: &Budget) -> Result<()> {
    let t = 2 * (budget.window + budget.top_k).min(300) + 37;
    let inputs = Inputs::new(t, heads);
    let routing = inputs.route(budget);
    let close = |fast: &Tensor, naive: &[f64]| fast.f32().iter().zip(naive).all(|(a, b)| (*a as f64 - b).abs() < 1e-4);
    let (o, _) = dense_attention::fwd(&inputs.q, &inputs.k, &inputs.v, 0, &[t]);
    ensure!(
        close(&o, &dense_attention::naive::fwd(&inputs.q, &inputs.k, &inputs.v, 0, &[t]).0),
        "dense attention disagrees with its naive twin"
    );
    let (o, _) = routed_attention::fwd(&inputs.q, &inputs.k, &inputs.v, None, &routing);
    ensure!(
        close(&o, &routed_attention::naive::fwd(&inputs.q, &inputs.k, &inputs.v, None, &routing).0),
        "routed attention disagrees with its naive twin"
    );
    Ok(())
}

/// Median seconds of at least three runs (one when a run takes over ten seconds), and the peak beyond what was held before.
fn timed(run: &dyn Fn()) -> (f64, u64) {
    memory::reset_peak();
    let before = memory::current_bytes();
    let mut seconds = Vec::new();
    while seconds.len() < 3 || (seconds.len() < 5 && seconds.iter().sum::<f64>() < 1.0) {
        let started = Instant::now();
        run();
        seconds.push(started.elapsed().as_secs_f64());
        if seconds[0] > 10.0 {
            break;
        }
    }
    seconds.sort_by(f64::total_cmp);
    (seconds[seconds.len() / 2], (memory::peak_bytes() - before) as u64)
}

/// Least-squares slope; none for fewer than three points.
fn slope(points: &[(f64, f64)]) -> Option<f64> {
    if points.len() < 3 {
        return None;
    }
    let n = points.len() as f64;
    let (mx, my) = (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
    let covariance: f64 = points.iter().map(|p| (p.0 - mx) * (p.1 - my)).sum();
    Some(covariance / points.iter().map(|p| (p.0 - mx).powi(2)).sum::<f64>())
}

fn train_step(args: &TrainStepArgs) -> Result<()> {
    let decoder = |n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size| ModelConfig {
        architecture: Architecture::Llama,
        n_layers,
        d_model,
        d_ff,
        n_heads,
        n_kv_heads,
        head_dim,
        vocab_size,
        max_seq_len: 8192,
        norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: None,
        tie_embeddings: true,
        qkv_bias: false,
        qk_norm: false,
    };
    let (model, context, batch) = match args.config.as_str() {
        "tiny" => (decoder(6, 128, 4, 2, 32, 384, 2048), 2048, 2),
        "135m" => (decoder(30, 576, 9, 3, 64, 1536, 49152), 512, 1),
        other => anyhow::bail!("unknown config `{other}`; expected tiny or 135m"),
    };
    let config = TrainConfig {
        seed: 1,
        model,
        optimizer: Default::default(),
        data: DataConfig { recall_share: 0.0, answer_weight: 1.0, text: Vec::new() },
        phases: vec![Phase { steps: 1000, context, batch, copy_share: 0.0 }],
        checkpoint: args.checkpoint,
    };
    let vocab = config.model.vocab_size as u64;
    let sequence = |row: u64| ((0..=context as u64).map(|i| (mix(row, i) % vocab) as u32).collect(), vec![1.0; context + 1]);
    let data = Batch::of(&(0..batch as u64).map(sequence).collect::<Vec<_>>());
    let n_params = Decoder::random(&config.model, 1).params().iter().map(|p| p.value.len()).sum::<usize>();
    let mut trainer = Pretrainer::new(config);
    trainer.step(&data)?; // the moments are allocated here
    memory::reset_peak();
    let mut speeds = Vec::new();
    for _ in 0..args.steps.max(1) {
        let report = trainer.step(&data)?;
        speeds.push(report.tokens as f64 / report.seconds);
    }
    speeds.sort_by(f64::total_cmp);
    let median = speeds[speeds.len() / 2];
    let peak = memory::peak_bytes() as u64;
    if args.json {
        println!(
            "{}",
            json!({"engine": "sluice", "config": args.config, "tokens_per_second": median, "min": speeds[0], "max": speeds[speeds.len() - 1],
                "peak_bytes": peak, "checkpoint": args.checkpoint, "threads": rayon::current_num_threads(), "parameters": n_params, "cpu": cpu_name()})
        );
    } else {
        println!("{}: {median:.0} tokens/s (median of {}), peak {}", args.config, speeds.len(), bytes(peak));
    }
    Ok(())
}
