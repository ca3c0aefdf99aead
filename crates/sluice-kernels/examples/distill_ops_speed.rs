//! Times of the ops that distillation has beside the model's own, at the shapes of SmolLM2-135M.
//!
//! `cargo run --release -p sluice-kernels --example distill_ops_speed -- [cpu|cuda] [T]`
#![expect(clippy::print_stdout, reason = "a measurement prints its table")]

use std::time::Instant;

use sluice_kernels::gate_loss::{RankLabels, Terms};
use sluice_kernels::ridge::RidgeSums;
use sluice_kernels::top_k_routing::{Budget, route_in_place};
use sluice_kernels::{
    attention_label, attention_mass, dense_attention, gate_loss, gumbel, kept_mass, log_rank, repeat_heads, weighted_mse,
};
use sluice_tensor::Device;
use sluice_tensor::cuda::{Gpu, Options};
use sluice_testkit::Rng;

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const WIDTH: usize = 576;
const SAMPLES: usize = 1000;
const HORIZON: usize = 1024;
const REPEATS: u32 = 20;

fn main() {
    let mut args = std::env::args().skip(1);
    let device = match args.next().as_deref() {
        Some("cuda") => Device::Cuda(Gpu::open(&Options::default()).expect("a usable GPU")),
        _ => Device::Cpu,
    };
    let t: usize = args.next().map_or(4096, |a| a.parse().expect("a number of tokens"));
    println!(
        "{device:?}, T = {t}, {HEADS} heads of {HEAD_DIM}, {KV_HEADS} KV heads, width {WIDTH}, {SAMPLES} sampled keys, horizon {HORIZON}"
    );

    let mut rng = Rng::new(1);
    let mut random = |shape: &[usize]| rng.normal_tensor(shape).to(&device);
    let (q, k) = (random(&[1, t, HEADS, HEAD_DIM]), random(&[1, t, KV_HEADS, HEAD_DIM]));
    let (x, other, w_o) = (random(&[1, t, WIDTH]), random(&[1, t, WIDTH]), random(&[WIDTH, HEADS * HEAD_DIM]));
    let (scores, labels, slopes) = (random(&[1, t, KV_HEADS]), random(&[SAMPLES, KV_HEADS]), random(&[KV_HEADS]));
    let shared = random(&[1, t, 1]);
    let lens = [t];
    let positions: Vec<u32> = (0..SAMPLES).map(|i| (i * t.saturating_sub(HORIZON) / SAMPLES) as u32).collect();
    let weights = sluice_tensor::Tensor::full(1.0 / t as f32, [t]).to(&device);
    let (_, lse) = dense_attention::fwd(&q, &k, &k, 0, &lens);
    let (key_weight, query_weight) = (attention_label::key_weight(&w_o, &k), attention_label::query_weight(&x));
    let budget = Budget { window: 128, top_k: 256, route_every: 64, n_sink: 4 };
    let routing = route_in_place(&scores, &lens, &budget);
    let mass = attention_mass::block_mass(&q, &k, &lse, budget.route_every, 1.0, &lens);
    let mut sums = RidgeSums::new(WIDTH, KV_HEADS);
    let (loss, factors) = weighted_mse::fwd(&x, &other, &weights);

    let time = |name: &str, op: &mut dyn FnMut()| {
        let mut run = |n: u32| {
            let start = Instant::now();
            (0..n).for_each(|_| op());
            if let Some(gpu) = device.gpu() {
                gpu.synchronize().expect("the kernels ran");
            }
            start.elapsed().as_secs_f64() / n as f64
        };
        run(2);
        let best = (0..3).map(|_| run(if device.gpu().is_some() { REPEATS } else { 1 })).fold(f64::INFINITY, f64::min);
        println!("{name:<32} {:>9.3} ms", best * 1e3);
    };
    time("key weight", &mut || drop(attention_label::key_weight(&w_o, &k)));
    time("query weight", &mut || drop(attention_label::query_weight(&x)));
    let at = [positions.clone()];
    time("future mass", &mut || {
        attention_mass::future_mass(&q, &k, &lse, Some(&key_weight), Some(&query_weight), &at, 128, HORIZON, 2.0, &lens);
    });
    time("block mass", &mut || drop(attention_mass::block_mass(&q, &k, &lse, budget.route_every, 1.0, &lens)));
    time("kept share", &mut || drop(kept_mass::kept_share(&mass, &routing)));
    time("log rank", &mut || drop(log_rank::minus_log_rank(&labels)));
    time("ridge sums", &mut || sums.add(&x, 1e-5, &positions, &labels));
    let terms = Terms { rank: 0.1, spread: 1e-3, smooth: 0.0025 };
    let rank = [Some(RankLabels { positions: &positions, labels: &labels, keep: 0.0625 })];
    time("gate loss and gradient", &mut || drop(gate_loss::fwd(&scores, &lens, &slopes, &rank, &terms)));
    time("relative error", &mut || drop(weighted_mse::fwd(&x, &other, &weights)));
    time("its gradient", &mut || drop(weighted_mse::bwd(&loss, &x, &other, &factors)));
    time("gate noise", &mut || drop(gumbel::add_noise(&scores, 7, 3, 1.0)));
    time("shared score, repeated", &mut || drop(repeat_heads::fwd(&shared, KV_HEADS)));
    time("attention of an encoder", &mut || drop(dense_attention::fwd_bidirectional(&q, &k, &k, &lens)));
}
