//! The case list of [`selftest`](crate::selftest). Predictions come from an output head, as in training.

use sluice_tensor::Tensor;
use sluice_testkit::Rng;

use super::{Terms, fwd, naive};
use crate::output_head::{Queued, RowWeights, Wanted, queue_cross_entropy};
use crate::selftest::Check;

const TERMS: Terms = Terms { sure: 0.5, share: 0.4, far_gain: 1.0, far_weight: 5.0 };

/// Rows of each document; every fifth row of the batch beside them has no loss.
const CASES: &[&[usize]] = &[&[], &[1], &[63], &[100, 1, 0, 1000], &[5000, 300]];

pub(crate) fn run(check: &mut Check<'_>) {
    for &documents in CASES {
        let (rows, vocab, m) = (documents.iter().sum::<usize>(), 7, 4);
        let n = rows + rows / 4;
        let known: Vec<f32> = (0..n).map(|i| if i % 5 == 4 { 0.0 } else { 1.0 }).collect();
        let mut rng = Rng::new(n as u64);
        let targets: Vec<u32> = (0..n).map(|_| rng.below(vocab) as u32).collect();
        let draws: Vec<f32> = (0..rows).map(|_| rng.uniform()).collect();
        let weights = RowWeights::of(&known, check.device());
        let mut predict = || -> Queued {
            let (h, w) = (rng.normal_tensor([n, m]), rng.normal_tensor([vocab, m]));
            queue_cross_entropy(&check.put(&h), &check.put(&w), &targets, &weights, Wanted::NOTHING)
        };
        let (teacher, local) = (predict(), predict());
        let [figures, locally] = [&teacher, &local].map(|x| x.figures.to(&sluice_tensor::Device::Cpu));
        for with_local in [true, false] {
            for terms in [TERMS, Terms { sure: 2.0, share: 0.0, ..TERMS }] {
                if !check.case("token_weights", format!("documents of {documents:?}, local {with_local}, share {}", terms.share)) {
                    continue;
                }
                let got = fwd(&teacher, with_local.then_some(&local), &draws, documents, &terms);
                let of_row = |i: usize| {
                    let [nll, probability] = [0, 2].map(|k| figures.f32()[i * 3 + k] as f64);
                    (nll, probability, if with_local { locally.f32()[i * 3] as f64 } else { nll }, draws[i] as f64)
                };
                let (mut want, mut from) = (Vec::new(), 0);
                for &n in documents {
                    want.extend(naive::of_document(&(from..from + n).map(of_row).collect::<Vec<_>>(), &terms));
                    from += n;
                }
                check.compare("weights", got.values(), &want, 1e-7);
                check.require("the same rows", got.rows() == weights.rows() && got.n() == n);
            }
        }
    }
    // A document of which nothing counts takes no part; a row with a weight of 0 leaves no trace in a loss.
    if !check.case("token_weights", "rows of weight 0") {
        return;
    }
    let (h, w) = (check.put(&Tensor::full(1.0, [2, 3])), check.put(&Tensor::full(1.0, [5, 3])));
    let weights = RowWeights::of(&[1.0, 1.0], check.device());
    let halves = weights.with_values(check.put(&Tensor::from_vec(vec![0.0, 0.5], [2])));
    let wanted = Wanted { input: true, weight: true };
    let queued = queue_cross_entropy(&h, &w, &[0, 1], &halves, wanted);
    check.compare("loss", &queued.loss, &[0.5 * 5f64.ln()], 1e-5);
    let dh = queued.dh.as_ref().expect("asked for").to(&sluice_tensor::Device::Cpu).to_dtype(sluice_tensor::DType::F32);
    check.require("no gradient", dh.f32()[..3].iter().all(|&d| d == 0.0));
}
