//! The case list of [`selftest`](crate::selftest). Gradients are means over keys, so they are compared times the number of keys.

use sluice_tensor::{Device, Tensor};
use sluice_testkit::Rng;

use super::{RankLabels, Terms, fwd, naive};
use crate::selftest::Check;

struct Case {
    t: usize,
    g: usize,
    shared_slope: bool,
    /// Sampled positions; none without ranking.
    n: usize,
    keep: f32,
    /// Labels are whole numbers.
    ties: bool,
}

const BASE: Case = Case { t: 100, g: 3, shared_slope: false, n: 40, keep: 0.3, ties: false };

const CASES: &[Case] = &[
    BASE,
    Case { t: 1, g: 1, n: 1, ..BASE },
    Case { n: 0, ..BASE },
    Case { t: 63, g: 2, shared_slope: true, n: 63, keep: 0.01, ..BASE },
    Case { ties: true, n: 99, keep: 0.5, ..BASE },
    Case { keep: 1.0, ..BASE },
    Case { t: 5000, g: 2, n: 1000, keep: 0.0625, ..BASE },
    Case { t: 8200, g: 1, n: 4096, keep: 0.125, ..BASE },
];

const TERMS: Terms = Terms { rank: 0.7, spread: 0.3, smooth: 0.2 };

pub(crate) fn run(check: &mut Check<'_>) {
    for &Case { t, g, shared_slope, n, keep, ties } in CASES {
        let tied = if ties { ", ties" } else { "" };
        if !check.case("gate_loss", format!("T {t}, {g} heads, {n} labels, keep {keep}{tied}")) {
            continue;
        }
        let mut rng = Rng::new(t as u64);
        let scores = rng.normal_tensor([1, t, g]);
        let slopes =
            Tensor::from_vec((0..if shared_slope { 1 } else { g }).map(|_| rng.uniform()).collect(), [if shared_slope { 1 } else { g }]);
        let positions: Vec<u32> = (0..n).map(|i| (i * t / n) as u32).collect();
        let mut labels = rng.normal_tensor([n, g]);
        if ties {
            labels.f32_mut().iter_mut().for_each(|label| *label = label.round());
        }
        let labels_there = check.put(&labels);
        let rank = |labels| (n > 0).then_some(RankLabels { positions: &positions, labels, keep });
        let run = |check: &mut Check<'_>| fwd(&check.put(&scores), &[t], &check.put(&slopes), &[rank(&labels_there)], &TERMS);
        let (loss, grad) = run(check);
        let (want, want_grad) = naive::loss(&scores, &slopes, rank(&labels).as_ref(), &TERMS);
        check.compare("loss", &loss, &[want], 3e-6);
        let times = |x: f64| x * (t * g) as f64;
        let grad = grad.to(&Device::Cpu);
        let per_key: Vec<f32> = grad.f32().iter().map(|&d| times(d as f64) as f32).collect();
        check.compare_slice("dscores", &per_key, &want_grad.into_iter().map(times).collect::<Vec<_>>(), 1e-5);
        let (again, _) = run(check);
        check.require("the same bits again", again.item().to_bits() == loss.item().to_bits());
    }
    ragged(check);
}

/// Sequences of different lengths, one of them without ranking: each has the loss and gradient that it has alone, padding has none.
fn ragged(check: &mut Check<'_>) {
    let (lens, g) = ([70usize, 33, 0, 58], 2);
    if !check.case("gate_loss", format!("lengths {lens:?}, {g} heads")) {
        return;
    }
    let mut rng = Rng::new(5);
    let scores = rng.normal_tensor([lens.len(), 70, g]);
    let slopes = Tensor::from_vec(vec![0.5, 2.0], [2]);
    let positions: Vec<u32> = (0..33).step_by(3).collect();
    let labels = rng.normal_tensor([positions.len(), g]);
    let labels_there = check.put(&labels);
    let rank = |sequence: usize, labels| (sequence < 2).then_some(RankLabels { positions: &positions, labels, keep: 0.3 });
    let ranks: Vec<_> = (0..lens.len()).map(|sequence| rank(sequence, &labels_there)).collect();
    let (loss, grad) = fwd(&check.put(&scores), &lens, &check.put(&slopes), &ranks, &TERMS);
    let (mut want, mut want_grad) = (0.0, vec![0.0; scores.len()]);
    for (sequence, &len) in lens.iter().enumerate().filter(|(_, len)| **len > 0) {
        let rows = sequence * 70 * g..(sequence * 70 + len) * g;
        let alone = Tensor::from_vec(scores.f32()[rows.clone()].to_vec(), [1, len, g]);
        let (loss, grad) = naive::loss(&alone, &slopes, rank(sequence, &labels).as_ref(), &TERMS);
        want += loss;
        want_grad[rows].copy_from_slice(&grad);
    }
    check.compare("loss", &loss, &[want], 5e-6);
    check.compare("dscores", &grad, &want_grad, 1e-6);
}
