//! `sluice bench attention`: dense and routed attention of one layer by context, as a table and a plot.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use serde_json::{Value, json};
use sluice_eval::report::scaling::{self, Curve};
use sluice_kernels::routed_attention::PlacedRouting;
use sluice_kernels::top_k_routing::{self, Budget};
use sluice_kernels::{dense_attention, routed_attention};
use sluice_spec::RoutingConfig;
use sluice_tensor::cuda::Precision;
use sluice_tensor::{DType, Device, Tensor, memory};
use sluice_train::hash::mix;

use super::floor::{Rates, floor};
use crate::commands::devices::cpu_name;
use crate::device::DeviceArgs;
use crate::progress::{bytes, grouped};

/// Arguments of `sluice bench attention`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Contexts in tokens [powers of two from 1024 to 65536, on a GPU to 1048576]
    #[arg(long, value_name = "N", num_args = 1..)]
    context: Vec<usize>,
    /// Dense attention up to this context [16384, on a GPU 262144]
    #[arg(long, value_name = "N")]
    dense_up_to: Option<usize>,
    /// Query heads, KV heads and head width
    #[arg(long, value_name = "N", num_args = 3, default_values_t = [9, 3, 64])]
    heads: Vec<usize>,
    /// Named budget: paper, edge, default or long
    #[arg(long, value_name = "NAME", default_value = "default")]
    preset: String,
    /// Write a plot of time and peak memory by context (SVG)
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Inputs of one attention layer, random, where the attention is computed and in the format of activations there.
struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
}

impl Inputs {
    fn new(t: usize, heads: &[usize], device: &Device) -> Self {
        let (h, g, d) = (heads[0], heads[1], heads[2]);
        let format = device.gpu().map_or(DType::F32, |gpu| gpu.precision().activations());
        let activation = |seed, shape| random(seed, shape).to(device).to_dtype(format);
        Self {
            q: activation(1, vec![1, t, h, d]),
            k: activation(2, vec![1, t, g, d]),
            v: activation(3, vec![1, t, g, d]),
            scores: random(4, vec![1, t, g]).to(device),
        }
    }

    fn route(&self, budget: &Budget) -> PlacedRouting {
        top_k_routing::route_in_place(&self.scores, &[self.q.shape()[1]], budget)
    }

    /// `o`, and with `backward` the gradients of `q`, `k` and `v` from `q` as the upstream gradient.
    fn dense(&self, backward: bool) -> Vec<Tensor> {
        let (Self { q, k, v, .. }, lens) = (self, [self.q.shape()[1]]);
        let (o, lse) = dense_attention::fwd(q, k, v, 0, &lens);
        if !backward {
            return vec![o];
        }
        let (dq, dk, dv) = dense_attention::bwd(q, q, k, v, &o, &lse, 0, &lens);
        vec![o, dq, dk, dv]
    }

    /// The same of routed attention, routing included.
    fn routed(&self, budget: &Budget, backward: bool) -> Vec<Tensor> {
        let (Self { q, k, v, .. }, routing) = (self, self.route(budget));
        let (o, lse) = routing.fwd(q, k, v, None);
        if !backward {
            return vec![o];
        }
        let grads = routing.bwd(q, q, k, v, &o, &lse, None);
        vec![o, grads.dq, grads.dk, grads.dv]
    }
}

/// Numbers that are close enough to normal for a benchmark: sums of three uniforms, centred.
pub(super) fn random(seed: u64, shape: Vec<usize>) -> Tensor {
    let n = shape.iter().product::<usize>() as u64;
    let uniform = |i: u64, s: u64| (mix(seed * 3 + s, i) >> 40) as f32 / (1u64 << 24) as f32;
    Tensor::from_vec((0..n).into_par_iter().map(|i| 2.0 * (uniform(i, 0) + uniform(i, 1) + uniform(i, 2)) - 3.0).collect(), shape)
}

pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(
        args.heads.len() == 3 && args.heads[0].is_multiple_of(args.heads[1]),
        "--heads takes query heads, KV heads (a divisor) and head width"
    );
    let routing = RoutingConfig::preset(&args.preset)?;
    let budget = sluice_model::policy::budget(&routing);
    let device = args.device.open()?;
    if let Some(gpu) = device.gpu() {
        ensure!(gpu.precision() == Precision::Bf16, "routed attention on a GPU is bf16, found --precision {}", gpu.precision().name());
        ensure!(matches!(args.heads[2], 64 | 128), "attention on a GPU serves heads of 64 and 128, found {}", args.heads[2]);
    }
    verify(&args.heads, &budget, &device)?;
    let (usual, usual_dense) = if device.gpu().is_some() { (20, 1 << 18) } else { (16, 1 << 14) };
    let contexts = if args.context.is_empty() { (10..=usual).map(|power| 1 << power).collect() } else { args.context.clone() };
    let dense_up_to = args.dense_up_to.unwrap_or(usual_dense);
    let rates = device.gpu().map(Rates::measure).transpose()?;
    let mut rows: Vec<Value> = Vec::new();
    for &t in &contexts {
        let inputs = Inputs::new(t, &args.heads, &device);
        let kinds: &[&str] = if t <= dense_up_to { &["dense", "routed"] } else { &["routed"] };
        for &name in kinds {
            let is_routed = name == "routed";
            let floors = rates.map(|rates| floor(&rates, &args.heads, t, is_routed.then_some(&budget)));
            for (pass, backward) in [("forward", false), ("forward and backward", true)] {
                let (seconds, peak) =
                    timed(&device, &|| drop(if is_routed { inputs.routed(&budget, backward) } else { inputs.dense(backward) }))?;
                let floor = floors.map(|(forward, both)| if backward { both } else { forward });
                rows.push(json!({"attention": name, "pass": pass, "context": t, "seconds": seconds, "peak_bytes": peak,
                    "floor_seconds": floor, "share_of_floor": floor.map(|floor| floor / seconds)}));
            }
        }
    }
    let exponents: Vec<Value> = ["dense", "routed"]
        .iter()
        .flat_map(|name| ["forward", "forward and backward"].map(|pass| (*name, pass)))
        .filter_map(|(name, pass)| {
            let of = |row: &&Value| row["attention"] == name && row["pass"] == pass;
            let points = |what: &str| -> Vec<(f64, f64)> {
                rows.iter().filter(of).filter_map(|r| Some((r["context"].as_f64()?.ln(), r[what].as_f64()?.ln()))).collect()
            };
            let (seconds, peaks) = (points("seconds"), points("peak_bytes"));
            // Short contexts cost what starting a kernel costs; the last three show how it goes on.
            let last = |points: &[(f64, f64)]| slope(&points[points.len().saturating_sub(3)..]);
            Some(json!({"attention": name, "pass": pass, "exponent": slope(&seconds)?, "exponent_of_last_three": last(&seconds),
                "memory_exponent_of_last_three": last(&peaks)}))
        })
        .collect();
    if let Some(path) = &args.out {
        draw(path, args, &routing, &device, &rows, &exponents)?;
    }
    let on = device.gpu().map_or_else(cpu_name, |gpu| gpu.name().to_string());
    if args.json {
        println!(
            "{}",
            json!({"device": on, "cpu": cpu_name(), "threads": rayon::current_num_threads(), "heads": args.heads, "routing": routing, "rates": rates, "rows": rows,
                "exponents": exponents})
        );
        return Ok(());
    }
    println!(
        "{on}, {} threads, heads {:?}, window {}, top_k {}, route_every {}",
        rayon::current_num_threads(),
        args.heads,
        routing.window,
        routing.top_k,
        routing.route_every
    );
    if let Some(Rates { flops, bytes }) = rates {
        println!("floor from {:.0} TFLOP/s and {:.2} TB/s, measured", flops / 1e12, bytes / 1e12);
    }
    println!("{:<8} {:<22} {:>9} {:>12} {:>12}", "", "pass", "context", "time", "peak memory");
    let share =
        |row: &Value| row["share_of_floor"].as_f64().map(|share| format!("  {:.0} % of the floor", 100.0 * share)).unwrap_or_default();
    for row in &rows {
        println!(
            "{:<8} {:<22} {:>9} {:>9.3} ms {:>12}{}",
            row["attention"].as_str().unwrap_or_default(),
            row["pass"].as_str().unwrap_or_default(),
            grouped(row["context"].as_u64().unwrap_or(0)),
            1e3 * row["seconds"].as_f64().unwrap_or(f64::NAN),
            bytes(row["peak_bytes"].as_u64().unwrap_or(0)),
            share(row)
        );
    }
    for e in exponents {
        println!(
            "time of {} {} grows with context to the power {:.2}; over the last three contexts {:.2}, its memory {:.2}",
            e["attention"].as_str().unwrap_or_default(),
            e["pass"].as_str().unwrap_or_default(),
            e["exponent"].as_f64().unwrap_or(f64::NAN),
            e["exponent_of_last_three"].as_f64().unwrap_or(f64::NAN),
            e["memory_exponent_of_last_three"].as_f64().unwrap_or(f64::NAN)
        );
    }
    Ok(())
}

/// The measured points as two plots in one SVG file.
fn draw(path: &Path, args: &Args, routing: &RoutingConfig, device: &Device, rows: &[Value], exponents: &[Value]) -> Result<()> {
    let curves: Vec<Curve> = exponents
        .iter()
        .map(|fit| {
            let mine = |row: &&Value| row["attention"] == fit["attention"] && row["pass"] == fit["pass"];
            let number = |row: &Value, key: &str| row[key].as_f64().unwrap_or(f64::NAN);
            Curve {
                is_routed: fit["attention"] == "routed",
                with_backward: fit["pass"] != "forward",
                exponent: number(fit, "exponent"),
                points: rows.iter().filter(mine).map(|r| (number(r, "context"), number(r, "seconds"), number(r, "peak_bytes"))).collect(),
            }
        })
        .collect();
    ensure!(!curves.is_empty(), "a plot needs at least three contexts of one kind of attention");
    let title = format!(
        "Attention of one layer, {} query and {} KV heads of {}, window {}, top_k {}, route_every {}, {}",
        args.heads[0],
        args.heads[1],
        args.heads[2],
        routing.window,
        routing.top_k,
        routing.route_every,
        device.gpu().map_or_else(|| format!("{} threads of {}", rayon::current_num_threads(), cpu_name()), |gpu| gpu.name().to_string())
    );
    std::fs::write(path, scaling::svg(&title, &curves)).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

/// Both kernels, forward and backward, against their naive twins, before anything is timed. Factors that the device rounds are rounded
/// before the twin sees them.
fn verify(heads: &[usize], budget: &Budget, device: &Device) -> Result<()> {
    let t = 2 * (budget.window + budget.top_k).min(300) + 37;
    let inputs = Inputs::new(t, heads, device);
    let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(|x| x.to(&Device::Cpu).to_dtype(DType::F32));
    // Norm of the error over the norm of the twin. Factors of bf16 have eight bits, and so have results.
    let allowed = if device.gpu().is_some() { 1e-2 } else { 1e-5 };
    let routing = inputs.route(budget).download();
    let (dq, dk, dv) = dense_attention::naive::bwd(&q, &q, &k, &v, 0, &[t]);
    let dense = [dense_attention::naive::fwd(&q, &k, &v, 0, &[t]).0, dq, dk, dv];
    let (dq, dk, dv, _) = routed_attention::naive::bwd(&q, &q, &k, &v, None, &routing);
    let routed = [routed_attention::naive::fwd(&q, &k, &v, None, &routing).0, dq, dk, dv];
    for (kind, fast, naive) in [("dense", inputs.dense(true), dense), ("routed", inputs.routed(budget, true), routed)] {
        for ((what, fast), naive) in ["o", "dq", "dk", "dv"].iter().zip(&fast).zip(&naive) {
            let fast = fast.to(&Device::Cpu).to_dtype(DType::F32);
            let error: f64 = fast.f32().iter().zip(naive).map(|(a, b)| (*a as f64 - b).powi(2)).sum::<f64>().sqrt();
            let error = error / naive.iter().map(|b| b * b).sum::<f64>().sqrt();
            // Not `>`: a NaN must not pass.
            ensure!(error <= allowed, "{what} of {kind} attention is off by {error:.1e} of its naive twin; allowed is {allowed:.0e}");
        }
    }
    Ok(())
}

/// Median seconds of at least three runs (one when a run takes over ten seconds), and the peak beyond what was held before. The first run
/// counts only when it takes over two seconds: on a GPU it finds kernels and memory for the others.
fn timed(device: &Device, run: &dyn Fn()) -> Result<(f64, u64)> {
    let wait = || device.gpu().map_or(Ok(()), |gpu| gpu.synchronize());
    let once = |runs: usize| -> Result<f64> {
        wait()?;
        let started = Instant::now();
        (0..runs).for_each(|_| run());
        wait()?;
        Ok(started.elapsed().as_secs_f64() / runs as f64)
    };
    memory::reset_peak();
    let before = memory::current_bytes();
    let mut seconds = vec![once(1)?];
    let peak = (memory::peak_bytes() - before) as u64;
    // A sample of a GPU lasts long enough that waiting for it does not show.
    let runs = if device.gpu().is_some() { (0.02 / seconds[0]).clamp(1.0, 200.0) as usize } else { 1 };
    if seconds[0] < 2.0 && device.gpu().is_some() {
        seconds.clear();
    }
    while seconds.first().is_none_or(|first| *first <= 10.0)
        && (seconds.len() < 3 || (seconds.len() < 5 && seconds.iter().sum::<f64>() < 1.0))
    {
        seconds.push(once(runs)?);
    }
    seconds.sort_by(f64::total_cmp);
    Ok((seconds[seconds.len() / 2], peak))
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
