use sluice_testkit::Rng;

use super::*;

/// `[T, K]` activations and `[N, K]` weights with outliers, which is what groups are for.
struct Case {
    tokens: usize,
    layout: Layout,
    bias: bool,
}

const CASES: [(usize, usize, usize, usize, bool); 11] = [
    (1, 1, 1, 32, false),
    (1, 16, 32, 32, true),
    (1, 100, 576, 32, false),
    (2, 63, 100, 64, true),
    (3, 17, 64, 64, false),
    (5, 40, 1000, 32, true),
    (7, 33, 31, 32, true),
    (15, 96, 160, 64, false),
    (32, 300, 64, 32, true),
    (33, 40, 64, 32, true),
    (70, 130, 96, 32, true),
];

fn cases() -> impl Iterator<Item = Case> {
    CASES.into_iter().map(|(tokens, rows, cols, group, bias)| Case { tokens, layout: Layout::new(rows, cols, group), bias })
}

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| rng.normal() * if rng.below(50) == 0 { 30.0 } else { 1.0 }).collect()
}

struct Operands {
    weights: Vec<f32>,
    values: Vec<u8>,
    scales: Vec<u16>,
    x: Vec<f32>,
    bias: Option<Vec<f32>>,
}

fn operands(case: &Case) -> Operands {
    let Layout { rows, cols, .. } = case.layout;
    let weights = numbers(rows * cols, 1);
    let (values, scales) = pack(&weights, case.layout).unwrap();
    let x = numbers(case.tokens * cols, 2);
    Operands { weights, values, scales, x, bias: case.bias.then(|| numbers(rows, 3)) }
}

fn quantised(x: &[f32], layout: Layout) -> QuantisedRows {
    let mut rows = QuantisedRows::new(x.len() / layout.cols, layout.cols, layout.group);
    x.chunks_exact(layout.cols).enumerate().for_each(|(row, x)| rows.set_row(row, x));
    rows
}

#[test]
fn every_instruction_set_and_thread_count_gives_the_bits_of_the_naive_twin() {
    for case in cases() {
        let o = operands(&case);
        let weights = PackedMatrix::new(case.layout, &o.values, &o.scales);
        let want = naive::linear(weights, &quantised(&o.x, case.layout), case.tokens, o.bias.as_deref());
        for instructions in InstructionSet::ALL.into_iter().filter(|set| set.is_available()) {
            let x = quantised(&o.x, case.layout);
            for threads in [1, 3] {
                let mut y = vec![f32::NAN; case.tokens * case.layout.rows];
                linear(&mut WorkerTeam::new(threads), instructions, weights, &x, case.tokens, o.bias.as_deref(), &mut y);
                assert_eq!(y, want, "{} on {threads} threads, {} tokens, {:?}", instructions.name(), case.tokens, case.layout);
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_alone_and_among_others() {
    let case = Case { tokens: 13, layout: Layout::new(50, 200, 32), bias: true };
    let o = operands(&case);
    let weights = PackedMatrix::new(case.layout, &o.values, &o.scales);
    let (mut team, best) = (WorkerTeam::new(2), InstructionSet::best());
    let mut all = vec![f32::NAN; 13 * 50];
    let x = quantised(&o.x, case.layout);
    linear(&mut team, best, weights, &x, 13, o.bias.as_deref(), &mut all);
    let mut alone = QuantisedRows::new(1, 200, 32);
    for (t, x) in o.x.chunks_exact(200).enumerate() {
        alone.set_row(0, x);
        let mut y = vec![f32::NAN; 50];
        linear(&mut team, best, weights, &alone, 1, o.bias.as_deref(), &mut y);
        assert_eq!(y, all[t * 50..(t + 1) * 50], "token {t}");
    }
}

#[test]
fn the_result_is_as_close_to_the_float_product_as_eight_bits_allow() {
    for case in cases() {
        let o = operands(&case);
        let Layout { rows, cols, group } = case.layout;
        let weights = PackedMatrix::new(case.layout, &o.values, &o.scales);
        let got = naive::linear(weights, &quantised(&o.x, case.layout), case.tokens, None);
        for t in 0..case.tokens {
            for n in 0..rows {
                let (x, w) = (&o.x[t * cols..(t + 1) * cols], &o.weights[n * cols..(n + 1) * cols]);
                let want: f64 = x.iter().zip(w).map(|(&x, &w)| x as f64 * w as f64).sum();
                // Half a step of each operand, times the other one.
                let bound: f64 = x
                    .chunks(group)
                    .zip(w.chunks(group))
                    .map(|(x, w)| {
                        let largest = |v: &[f32]| v.iter().fold(0.0f32, |m, v| m.max(v.abs())) as f64;
                        let (dx, dw) = (0.502 * largest(x) / LARGEST as f64, 0.56 * largest(w) / 127.0);
                        x.iter().zip(w).map(|(&x, &w)| dx * w.abs() as f64 + dw * x.abs() as f64 + dx * dw).sum::<f64>()
                    })
                    .sum();
                let got = got[t * rows + n] as f64;
                assert!((got - want).abs() <= bound + 1e-5, "{got} for {want} within {bound}");
            }
        }
    }
}

#[test]
fn a_row_comes_back_within_half_a_step() {
    let layout = Layout::new(37, 100, 32);
    let weights = numbers(37 * 100, 9);
    let (values, scales) = pack(&weights, layout).unwrap();
    let mut row = vec![f32::NAN; 100];
    for (n, want) in weights.chunks_exact(100).enumerate() {
        PackedMatrix::new(layout, &values, &scales).dequantise_row(n, &mut row);
        for (group, got) in want.chunks(32).zip(row.chunks(32)) {
            let step = group.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
            assert!(group.iter().zip(got).all(|(w, g)| (w - g).abs() <= 0.56 * step), "{group:?} {got:?}");
        }
    }
}

/// Root of the mean squared rounding error, in steps of `max |w| / 127`.
fn rounding_error(weights: &[f32]) -> f64 {
    let layout = Layout::new(weights.len() / 32, 32, 32);
    let (values, scales) = pack(weights, layout).unwrap();
    let mut row = vec![f32::NAN; 32];
    let squares = weights.chunks_exact(32).enumerate().map(|(n, want)| {
        PackedMatrix::new(layout, &values, &scales).dequantise_row(n, &mut row);
        let step = want.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
        want.iter().zip(&row).map(|(w, got)| ((w - got) / step).powi(2) as f64).sum::<f64>()
    });
    (squares.sum::<f64>() / weights.len() as f64).sqrt()
}

#[test]
fn blocks_of_a_quantised_file_lose_less_than_others() {
    let mut rng = Rng::new(4);
    let f16 = |x: f32| half::f16::from_f32(x).to_f32();
    let mut blocks = |block: &mut dyn FnMut(&mut Rng) -> Vec<f32>| (0..300).flat_map(|_| block(&mut rng)).collect::<Vec<f32>>();
    // Q8_0: a scale and whole numbers, the largest of which is 127.
    let exact = blocks(&mut |rng| {
        let scale = f16(0.001 + 0.01 * rng.uniform());
        (0..32).map(|i| scale * if i == 9 { -127.0 } else { rng.below(255) as f32 - 127.0 }).collect()
    });
    assert_eq!(rounding_error(&exact), 0.0);
    // Q4_1: sixteen levels from a smallest one on.
    let levels = blocks(&mut |rng| {
        let (scale, min) = (f16(0.01 + 0.01 * rng.uniform()), f16(-0.05 - 0.1 * rng.uniform()));
        (0..32).map(|i| min + scale * if i < 2 { 15.0 * i as f32 } else { rng.below(16) as f32 }).collect()
    });
    let any = blocks(&mut |rng| (0..32).map(|_| rng.normal()).collect());
    let (levels, any) = (rounding_error(&levels), rounding_error(&any));
    // Rounding to the first scale alone costs 0.289 of a step.
    assert!(levels < 0.13 && (0.1..0.27).contains(&any), "{levels} of a step for Q4_1, {any} for normal numbers");
}

#[test]
fn weights_that_int8_cannot_hold_are_named() {
    let layout = Layout::new(2, 40, 32);
    for bad in [f32::NAN, f32::INFINITY, 1e9] {
        let mut weights = vec![1.0; 80];
        weights[75] = bad;
        let error = pack(&weights, layout).unwrap_err();
        assert_eq!((error.row, error.col), (1, 35), "{error}");
    }
    assert!(pack(&[1e-12; 80], layout).unwrap().0.iter().all(|&v| v == 128), "below the smallest scale");
}

#[test]
fn activations_that_are_not_finite_reach_the_result() {
    let layout = Layout::new(3, 32, 32);
    let (values, scales) = pack(&[0.5; 96], layout).unwrap();
    let mut x = QuantisedRows::new(1, 32, 32);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut row = [1.0; 32];
        row[7] = bad;
        x.set_row(0, &row);
        let y = naive::linear(PackedMatrix::new(layout, &values, &scales), &x, 1, None);
        assert!(y.iter().all(|y| y.is_nan()), "{y:?}");
    }
}
