//! The specification, term by term in f64.

use sluice_tensor::Tensor;

use super::{RankLabels, Terms};

/// The loss and its gradient by the scores.
pub fn loss(scores: &Tensor, slopes: &Tensor, rank: Option<&RankLabels<'_>>, terms: &Terms) -> (f64, Vec<f64>) {
    let [_, t, g] = scores.dims();
    let (mut loss, mut grad) = (0.0, vec![0.0; t * g]);
    for head in 0..g {
        let slope = slopes.f32()[if slopes.len() == 1 { 0 } else { head }] as f64;
        let x: Vec<f64> = (0..t).map(|j| scores.f32()[j * g + head] as f64 - slope * j as f64 / 1024.0).collect();
        let mean = x.iter().sum::<f64>() / t as f64;
        let (spread, smooth) = (terms.spread as f64 / (t * g) as f64, terms.smooth as f64 / (t * g) as f64);
        for j in 0..t {
            loss += spread * (x[j] - mean).powi(2);
            grad[j * g + head] += 2.0 * spread * (x[j] - mean);
        }
        for j in 1..t {
            loss += smooth * (x[j - 1] - x[j]).powi(2);
            grad[(j - 1) * g + head] += 2.0 * smooth * (x[j - 1] - x[j]);
            grad[j * g + head] -= 2.0 * smooth * (x[j - 1] - x[j]);
        }
        let Some(RankLabels { positions, labels, keep }) = rank else { continue };
        let n = positions.len();
        let n_kept = ((*keep * n as f32).round() as usize).clamp(1, n);
        let threshold = |mut values: Vec<f64>| {
            values.sort_by(|a, b| b.total_cmp(a));
            values[n_kept - 1]
        };
        let label = |i: usize| labels.f32()[i * g + head] as f64;
        let (label_threshold, tau) =
            (threshold((0..n).map(label).collect()), threshold(positions.iter().map(|&p| x[p as usize]).collect()));
        for (i, &p) in positions.iter().enumerate() {
            let probability = 1.0 / (1.0 + (tau - x[p as usize]).exp());
            let target = if label(i) >= label_threshold { 1.0 } else { 0.0 };
            let weight = terms.rank as f64 / (n * g) as f64;
            loss -= weight * if target == 1.0 { probability.ln() } else { (1.0 - probability).ln() };
            grad[p as usize * g + head] += weight * (probability - target);
        }
    }
    (loss, grad)
}
