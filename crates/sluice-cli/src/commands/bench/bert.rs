//! `sluice bench bert`: forward passes of an encoder of the shape of BERT-large with random weights, in samples per second.

use std::time::Instant;

use anyhow::{Result, ensure};
use rayon::prelude::*;
use serde_json::json;
use sluice_kernels::top_k_routing::Budget;
use sluice_model::{Encoder, EncoderAttention, TextBatch};
use sluice_spec::EncoderConfig;
use sluice_tensor::cuda::Precision;
use sluice_tensor::{DType, Device, Tensor, memory};
use sluice_train::hash::mix;

use crate::device::{DeviceArgs, name_and_precision};
use crate::progress::bytes;

/// Arguments of `sluice bench bert`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Tokens of a sample
    #[arg(long, value_name = "N", default_value_t = 128)]
    sequence: usize,
    /// Samples of a pass
    #[arg(long, value_name = "N", default_value_t = 64)]
    batch: usize,
    /// Passes that are timed, after three that are not
    #[arg(long, value_name = "N", default_value_t = 20)]
    runs: usize,
    /// Layers, instead of BERT-large's 24
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Bidirectional routed attention: a window of 32 and 32 kept tokens, instead of every token
    #[arg(long)]
    routed: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Samples of the pass that is compared.
const COMPARED: usize = 2;

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut config = EncoderConfig::bert_large();
    config.n_layers = args.layers.unwrap_or(config.n_layers);
    config.max_seq_len = config.max_seq_len.max(args.sequence);
    config.validate()?;
    ensure!(args.sequence > 0 && args.batch >= COMPARED, "--sequence starts at 1 and --batch at {COMPARED}");
    let device = args.device.open()?;
    let budget = Budget { window: 32, top_k: 32, route_every: 1, n_sink: 4 };
    let attention = if args.routed { EncoderAttention::Routed(budget) } else { EncoderAttention::Dense };
    let on_cpu = random(&config);
    let batch = texts(&config, args.batch, args.sequence);
    let encoder = on_cpu.clone().to(&device);
    let error = verify(&on_cpu, &encoder, &batch, args.sequence, attention)?;
    drop(on_cpu);

    let pass = || -> Result<()> {
        drop(encoder.forward(&batch, attention));
        if let Device::Cuda(gpu) = &device {
            gpu.synchronize()?;
        }
        Ok(())
    };
    for _ in 0..3 {
        pass()?;
    }
    device.gpu().map_or_else(memory::reset_peak, |gpu| gpu.reset_peak());
    let waits_before = device.gpu().map(|gpu| gpu.waits());
    let mut seconds = Vec::new();
    for _ in 0..args.runs.max(1) {
        let started = Instant::now();
        pass()?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    // One wait a pass is the clock's.
    let waits = device.gpu().zip(waits_before).map(|(gpu, before)| (gpu.waits() - before) as f64 / seconds.len() as f64 - 1.0);
    let peak = device.gpu().map_or_else(memory::peak_bytes, |gpu| gpu.peak_bytes()) as u64;
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let samples = args.batch as f64 / median;
    // Routed attention has less of it.
    let flops = (!args.routed).then(|| config.forward_flops(args.batch, args.sequence) / median);
    let (name, precision) = name_and_precision(&device);
    if args.json {
        println!(
            "{}",
            json!({"device": name, "precision": precision, "threads": rayon::current_num_threads(), "sequence": args.sequence, "batch": args.batch, "layers": config.n_layers,
                "routed": args.routed, "samples_per_second": samples, "seconds_median": median, "seconds_least": seconds[0], "seconds_most": seconds[seconds.len() - 1],
                "flops_per_second": flops, "waits_per_pass": waits, "peak_bytes": peak, "parameters": config.n_params(), "relative_error": error})
        );
        return Ok(());
    }
    println!(
        "{samples:.1} samples/s: {} samples of {} tokens in {:.2} ms (median of {}, {:.2} to {:.2}) on {name} in {precision}",
        args.batch,
        args.sequence,
        1e3 * median,
        seconds.len(),
        1e3 * seconds[0],
        1e3 * seconds[seconds.len() - 1]
    );
    let rate = flops.map_or(String::new(), |flops| format!("{:.1} TFLOP/s, ", flops / 1e12));
    println!("{rate}peak memory {}, states off by {error:.1e} of their size", bytes(peak));
    Ok(())
}

/// Weights as BERT begins (uniform of std 0.02, norms 1, biases 0 would hide a forgotten one, so they are random as well).
fn random(config: &EncoderConfig) -> Encoder {
    let mut index = 0;
    Encoder::assemble(config, |name, shape| {
        index += 1;
        let (centre, spread) = if name.ends_with("LayerNorm.weight") { (1.0, 0.1) } else { (0.0, 0.02 * 12f32.sqrt()) };
        let number = |i: usize| centre + spread * ((mix(index, i as u64) >> 40) as f32 / (1u64 << 24) as f32 - 0.5);
        Tensor::from_vec((0..shape.iter().product()).into_par_iter().map(number).collect(), shape)
    })
}

fn texts(config: &EncoderConfig, batch: usize, sequence: usize) -> TextBatch {
    let token = |i: usize| (mix(1, i as u64) % config.vocab_size as u64) as u32;
    TextBatch { tokens: (0..batch * sequence).map(token).collect(), lens: vec![sequence; batch] }
}

/// States of the first samples, among all of them on the device, against those of a pass of their own in main memory: the relative error, or an error when it
/// is larger than the number format explains.
fn verify(on_cpu: &Encoder, encoder: &Encoder, batch: &TextBatch, sequence: usize, attention: EncoderAttention) -> Result<f64> {
    let few = TextBatch { tokens: batch.tokens[..COMPARED * sequence].to_vec(), lens: vec![sequence; COMPARED] };
    let want = on_cpu.forward(&few, attention);
    let got = encoder.forward(batch, attention).to(&Device::Cpu).to_dtype(DType::F32);
    let (want, got) = (want.f32(), &got.f32()[..want.len()]);
    let size: f64 = want.iter().map(|x| (*x as f64).powi(2)).sum();
    let off: f64 = want.iter().zip(got).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum();
    let error = (off / size).sqrt();
    // Unit roundoff times a factor for the depth; a wrong kernel is off by one.
    let allowed = match encoder.device().gpu().map(|gpu| gpu.precision()) {
        Some(Precision::Bf16) => 0.05,
        Some(Precision::Tf32) => 0.01,
        _ => 1e-4,
    };
    ensure!(error <= allowed, "states are off by {error:.2e} of their size from those of the CPU, where {allowed:.0e} is allowed");
    Ok(error)
}
