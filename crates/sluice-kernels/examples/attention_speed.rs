//! Speed of dense and routed attention, forward and backward, in GFLOP/s that the mathematics needs.
//!
//! `cargo run -p sluice-kernels --example attention_speed -- [top_k route_every]`
#![expect(clippy::print_stdout, reason = "a measurement prints its table")]

use std::time::Instant;

use sluice_kernels::top_k_routing::{Budget, route};
use sluice_kernels::{dense_attention, routed_attention};
use sluice_tensor::Tensor;
use sluice_tensor::memory;
use sluice_testkit::Rng;

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const WIDTH: usize = 64;

fn main() {
    let args: Vec<usize> = std::env::args().skip(1).map(|a| a.parse().expect("a number")).collect();
    let (top_k, every) = (args.first().copied().unwrap_or(256), args.get(1).copied().unwrap_or(64));
    println!("{HEADS} heads, {KV_HEADS} KV heads, D = {WIDTH}, {} threads", rayon::current_num_threads());
    println!("{:<34} {:>6} {:>10} {:>9} {:>10} {:>9} {:>9}", "", "T", "fwd ms", "GFLOP/s", "bwd ms", "GFLOP/s", "peak MiB");
    for t in [256, 1024, 4096, 16384] {
        let mut rng = Rng::new(t as u64);
        let q = rng.normal_tensor([1, t, HEADS, WIDTH]);
        let k = rng.normal_tensor([1, t, KV_HEADS, WIDTH]);
        let v = rng.normal_tensor([1, t, KV_HEADS, WIDTH]);
        let scores = rng.normal_tensor([1, t, KV_HEADS]);
        let pairs: usize = (1..=t).sum();
        report(
            "dense",
            t,
            pairs,
            || dense_attention::fwd(&q, &k, &v, 0, &[t]),
            |(o, lse)| {
                dense_attention::bwd(&q, &q, &k, &v, o, lse, 0, &[t]);
            },
        );
        let budget = Budget { window: 128, top_k, route_every: every, n_sink: 4 };
        let routing = route(&scores, &[t], &budget);
        let pairs = (0..t).map(|i| routing.routed(0, routing.block_of(i), 0).len() + i + 1 - routing.first_local(i)).sum();
        let name = format!("routed k {top_k} w 128 r {every}");
        report(
            &name,
            t,
            pairs,
            || routed_attention::fwd(&q, &k, &v, None, &routing),
            |(o, lse)| {
                routed_attention::bwd(&q, &q, &k, &v, o, lse, None, &routing);
            },
        );
        let bias = Some(routed_attention::GateBias { scores: &scores, temperature: 0.5 });
        report(
            &format!("{name} bias"),
            t,
            pairs,
            || routed_attention::fwd(&q, &k, &v, bias, &routing),
            |(o, lse)| {
                routed_attention::bwd(&q, &q, &k, &v, o, lse, bias, &routing);
            },
        );
    }
}

/// `pairs`: visible keys summed over the queries of one head.
fn report(name: &str, t: usize, pairs: usize, fwd: impl Fn() -> (Tensor, Tensor), bwd: impl Fn(&(Tensor, Tensor))) {
    // Two products of a query with a key forward, five backward; a multiply-add is two operations.
    let flops = |products: usize| (2 * products * pairs * HEADS * WIDTH) as f64;
    let out = fwd();
    let fwd_s = best_of(|| drop(fwd()));
    memory::reset_peak();
    let before = memory::current_bytes();
    let bwd_s = best_of(|| bwd(&out));
    let peak = (memory::peak_bytes() - before) as f64 / (1 << 20) as f64;
    println!(
        "{name:<34} {t:>6} {:>10.2} {:>9.1} {:>10.2} {:>9.1} {peak:>9.1}",
        fwd_s * 1e3,
        flops(2) / fwd_s / 1e9,
        bwd_s * 1e3,
        flops(5) / bwd_s / 1e9
    );
}

fn best_of(mut f: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    while begin.elapsed().as_secs_f64() < 1.0 || best == f64::INFINITY {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}
