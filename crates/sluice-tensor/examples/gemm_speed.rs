//! GFLOP/s of the three matrix products of a linear layer, for the layers of a SmolLM2-135M training step.
//!
//!     cargo run --release -p sluice-tensor --example gemm_speed [rows]
#![expect(clippy::print_stdout, reason = "a measurement prints its table")]

use std::time::Instant;

use sluice_tensor::gemm::{Mat, gemm};

fn main() {
    let rows: usize = std::env::args().nth(1).map_or(512, |n| n.parse().expect("a number of rows"));
    println!("{:>6} {:>6} {:>6}  {:>9} {:>9} {:>9}", "rows", "in", "out", "x w^T", "dy w", "dy^T x");
    for (k, n) in
        [(576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152), (128, 128), (128, 64), (128, 384), (384, 128), (128, 2048)]
    {
        // Logits come in chunks.
        let m = if n == 49152 { rows.min(170) } else { rows };
        let (x, w, dy) = (noise(m * k, 1), noise(n * k, 2), noise(m * n, 3));
        let (mut y, mut dx, mut dw) = (vec![0.0; m * n], vec![0.0; m * k], vec![0.0; n * k]);
        let speed = |work: &mut dyn FnMut()| {
            let mut seconds: Vec<f64> = (0..7)
                .map(|_| {
                    let started = Instant::now();
                    work();
                    started.elapsed().as_secs_f64()
                })
                .collect();
            seconds.sort_by(f64::total_cmp);
            2e-9 * (m * k * n) as f64 / seconds[3]
        };
        let forward = speed(&mut || gemm(Mat::new(&x, m, k), Mat::new(&w, n, k).t(), &mut y, n, false));
        let input = speed(&mut || gemm(Mat::new(&dy, m, n), Mat::new(&w, n, k), &mut dx, k, false));
        let weight = speed(&mut || gemm(Mat::new(&dy, m, n).t(), Mat::new(&x, m, k), &mut dw, k, false));
        println!("{m:>6} {k:>6} {n:>6}  {forward:>9.1} {input:>9.1} {weight:>9.1}");
    }
}

fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}
