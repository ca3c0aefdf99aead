//! Times of an encoder's attention over one text on a GPU: dense, and routed with its router.
//!
//! `cargo run --release -p sluice-kernels --example encoder_attention_speed -- [T]... [bf16|tf32] [HEADSxWIDTH] [WINDOW+TOP_K]`
#![expect(clippy::print_stdout, reason = "a measurement prints its table")]

use std::time::Instant;

use sluice_kernels::top_k_routing::{Budget, route_bidirectional_in_place};
use sluice_kernels::{dense_attention, routed_attention};
use sluice_tensor::Device;
use sluice_tensor::cuda::{Gpu, Options, Precision};
use sluice_testkit::Rng;

fn main() {
    let (mut lengths, mut precision, mut heads, mut budget) = (Vec::new(), Precision::Bf16, (16, 64), (128, 256));
    let two = |text: &str, by: char| text.split_once(by).and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    for arg in std::env::args().skip(1) {
        match arg.as_str() {
            "bf16" => precision = Precision::Bf16,
            "tf32" => precision = Precision::Tf32,
            text => match (text.parse::<usize>(), two(text, 'x'), two(text, '+')) {
                (Ok(t), ..) => lengths.push(t),
                (_, Some(h_d), _) => heads = h_d,
                (_, _, Some(w_k)) => budget = w_k,
                _ => panic!("{text}: not one of the arguments above"),
            },
        }
    }
    let ((h, d), (window, top_k)): ((usize, usize), (usize, usize)) = (heads, budget);
    let gpu = Gpu::open(&Options { precision, ..Options::default() }).expect("a usable GPU");
    let device = Device::Cuda(gpu.clone());
    println!("{}, {}, {h} heads of {d}, window {window}, top_k {top_k}; milliseconds", gpu.name(), precision.name());
    println!("{:>8} {:>9} {:>9} {:>9} {:>12}", "T", "dense", "router", "routed", "dense/routed");
    for t in lengths {
        let mut rng = Rng::new(1);
        let qkv = rng.normal_tensor([1, t, 3, h, d]).to(&device).to_dtype(precision.activations());
        let scores = rng.normal_tensor([1, t, h]).to(&device);
        let budget = Budget { window, top_k, route_every: 1, n_sink: 4 };
        let lens = dense_attention::Lens::new(&[t], &device);
        let routing = route_bidirectional_in_place(&scores, &[t], &budget);
        let time = |op: &dyn Fn()| {
            let run = |n: u32| {
                let start = Instant::now();
                (0..n).for_each(|_| op());
                gpu.synchronize().expect("the kernels ran");
                start.elapsed().as_secs_f64() / n as f64
            };
            // About 30 ms a measurement, the fastest of five.
            let n = (0.03 / run(3).max(1e-6)).clamp(3.0, 500.0) as u32;
            1e3 * (0..5).map(|_| run(n)).fold(f64::INFINITY, f64::min)
        };
        let dense = time(&|| drop(dense_attention::fwd_packed(&qkv, &lens)));
        let router = time(&|| drop(route_bidirectional_in_place(&scores, &[t], &budget)));
        let routed = time(&|| drop(routed_attention::fwd_packed(&qkv, &routing)));
        println!("{t:>8} {dense:>9.4} {router:>9.4} {routed:>9.4} {:>12.1}", dense / (router + routed));
    }
}
