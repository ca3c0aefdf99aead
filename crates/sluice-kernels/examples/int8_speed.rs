//! Speed of the int8 products on this machine: one token against the speed at which the weights can be read, and a prompt
//! against the arithmetic. `cargo run --release -p sluice-kernels --example int8_speed -- [THREADS]`
#![expect(clippy::print_stdout, reason = "a measurement prints its table")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use sluice_kernels::int8_linear::{InstructionSet, Layout, PackedMatrix, QuantisedRows, linear, pack};
use sluice_kernels::worker_team::WorkerTeam;

/// `[N, K]` of a layer of a model of 135 million parameters: queries, keys and values; output; SwiGLU's gate and up; down.
const SHAPES: [(usize, usize); 4] = [(960, 576), (576, 576), (3072, 576), (576, 1536)];
const LAYERS: usize = 30;

fn main() {
    let threads = std::env::args().nth(1).map_or(2, |n| n.parse().expect("a number of threads"));
    let mut team = WorkerTeam::new(threads);
    for group in [32, 64] {
        let matrices: Vec<(Layout, Vec<u8>, Vec<u16>)> = (0..LAYERS)
            .flat_map(|_| SHAPES)
            .map(|(rows, cols)| {
                let layout = Layout::new(rows, cols, group);
                let weights: Vec<f32> =
                    (0..rows * cols).map(|i| ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 1e8 - 0.08).collect();
                let (values, scales) = pack(&weights, layout).expect("the weights are small");
                (layout, values, scales)
            })
            .collect();
        let bytes: usize = matrices.iter().map(|(_, values, scales)| values.len() + 2 * scales.len()).sum();
        let read = best_of_nine(|| {
            let total = AtomicU64::new(0);
            team.run(matrices.len(), |i| {
                let words: &[u64] = bytemuck::cast_slice(&matrices[i].1[..matrices[i].1.len() / 8 * 8]);
                total.fetch_xor(words.iter().fold(0, |all, word| all ^ word), Ordering::Relaxed);
            });
            assert_ne!(total.into_inner(), 1);
        });
        println!("groups of {group}: {:.0} MB, read at {:.1} GB/s", bytes as f64 / 1e6, bytes as f64 / read / 1e9);
        for instructions in InstructionSet::ALL.into_iter().filter(|set| set.is_available()) {
            for tokens in [1, 256] {
                if instructions == InstructionSet::Plain && tokens > 1 {
                    continue;
                }
                let mut inputs: Vec<QuantisedRows> = SHAPES.iter().map(|&(_, cols)| QuantisedRows::new(tokens, cols, group)).collect();
                for rows in &mut inputs {
                    let x: Vec<f32> = (0..rows.cols()).map(|i| (i % 23) as f32 - 11.0).collect();
                    (0..tokens).for_each(|row| rows.set_row(row, &x));
                }
                let mut y = vec![0.0; tokens * 3072];
                let seconds = best_of_nine(|| {
                    for (i, (layout, values, scales)) in matrices.iter().enumerate() {
                        let weights = PackedMatrix::new(*layout, values, scales);
                        linear(&mut team, instructions, weights, &inputs[i % 4], tokens, None, &mut y[..tokens * layout.rows]);
                    }
                });
                let operations = 2.0 * tokens as f64 * matrices.iter().map(|(layout, ..)| layout.rows * layout.cols).sum::<usize>() as f64;
                println!(
                    "  {:<12} {tokens:>4} tokens  {:>7.2} ms  {:>6.1} GB/s ({:>3.0} % of reading)  {:>6.0} GOP/s",
                    instructions.name(),
                    1e3 * seconds,
                    bytes as f64 / seconds / 1e9,
                    100.0 * read / seconds,
                    operations / seconds / 1e9
                );
            }
        }
    }
}

fn best_of_nine(mut run: impl FnMut()) -> f64 {
    let time = |run: &mut dyn FnMut()| {
        let started = Instant::now();
        run();
        started.elapsed().as_secs_f64()
    };
    (0..9).map(|_| time(&mut run)).fold(f64::INFINITY, f64::min)
}
