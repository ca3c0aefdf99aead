//! Sequence by sequence, head by head.

use sluice_tensor::Tensor;

use super::{RankLabels, Terms};
use crate::gate_score::RECENCY_UNIT;

pub(super) fn fwd(scores: &Tensor, lens: &[usize], slopes: &Tensor, ranks: &[Option<RankLabels<'_>>], terms: &Terms) -> (Tensor, Tensor) {
    let [_, t, g] = scores.dims();
    let (mut loss, mut grad) = (0.0, vec![0.0; scores.len()]);
    for (sequence, (&len, rank)) in lens.iter().zip(ranks).enumerate() {
        let rows = sequence * t * g..(sequence * t + len) * g;
        let rank = rank.as_ref().filter(|rank| !rank.positions.is_empty());
        loss += of_sequence(&scores.f32()[rows.clone()], &mut grad[rows], g, slopes, rank, terms);
    }
    (Tensor::scalar(loss as f32), Tensor::from_vec(grad, scores.shape()))
}

/// The loss of `scores [T, G]`; its gradient is added to `grad`.
fn of_sequence(scores: &[f32], grad: &mut [f32], g: usize, slopes: &Tensor, rank: Option<&RankLabels<'_>>, terms: &Terms) -> f64 {
    let t = scores.len() / g.max(1);
    let slope = |head: usize| slopes.f32()[head.min(slopes.len() - 1)];
    let content: Vec<f32> = scores.iter().enumerate().map(|(i, s)| s - slope(i % g) * (i / g) as f32 / RECENCY_UNIT).collect();
    let mut loss = 0.0f64;
    for head in 0..g {
        let at = |j: usize| content[j * g + head];
        let mean = (0..t).map(|j| at(j) as f64).sum::<f64>() / t as f64;
        let scale = 1.0 / (t * g) as f32;
        for j in 0..t {
            let centred = at(j) - mean as f32;
            loss += (terms.spread * scale * centred * centred) as f64;
            grad[j * g + head] += 2.0 * terms.spread * scale * centred; // the mean's own gradient sums to zero
            if j + 1 < t {
                let step = at(j) - at(j + 1);
                loss += (terms.smooth * scale * step * step) as f64;
                grad[j * g + head] += 2.0 * terms.smooth * scale * step;
                grad[(j + 1) * g + head] -= 2.0 * terms.smooth * scale * step;
            }
        }
        if let Some(rank) = rank {
            let n = rank.positions.len();
            let label = |i: usize| rank.labels.f32()[i * g + head];
            let label_threshold = nth_largest((0..n).map(label).collect(), rank.n_kept());
            let tau = nth_largest(rank.positions.iter().map(|&p| at(p as usize)).collect(), rank.n_kept());
            for (i, &position) in rank.positions.iter().enumerate() {
                let z = at(position as usize) - tau;
                let target = if label(i) >= label_threshold { 1.0 } else { 0.0 };
                let scale = terms.rank / (n * g) as f32;
                loss += (scale * (softplus(z) - target * z)) as f64;
                grad[position as usize * g + head] += scale * (sigmoid(z) - target);
            }
        }
    }
    loss
}

fn nth_largest(mut values: Vec<f32>, n: usize) -> f32 {
    let (_, nth, _) = values.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a));
    *nth
}

fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + (-z).exp())
}

fn softplus(z: f32) -> f32 {
    z.max(0.0) + (-z.abs()).exp().ln_1p()
}
