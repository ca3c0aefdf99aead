//! Negative log-likelihood of one target per row.

use rayon::prelude::*;
use sluice_tensor::Tensor;
use sluice_tensor::memory::Scratch;

use super::{Gradients, Queued, RowWeights, Wanted, check_shapes, cuda, even_chunks, gather, rows_per_chunk, weighted_rows, weighted_sum};
use crate::linear::project;
use crate::vector_math::{argmax, exp, sum_exp, vectorised};

/// Losses per row and the gradients that were asked for.
pub struct CrossEntropy {
    /// `-log softmax(z)[target]`, without the weight; 0 for rows of weight 0.
    pub nll: Vec<f32>,
    /// The most likely token, the lowest among equals; `u32::MAX` for rows of weight 0.
    pub top1: Vec<u32>,
    /// Its probability; 0 for rows of weight 0.
    pub max_prob: Vec<f32>,
    /// `[n, M]`.
    pub dh: Option<Tensor>,
    /// `[V, M]`.
    pub dw: Option<Tensor>,
}

impl CrossEntropy {
    /// `sum_i weights[i] nll_i`: the loss that the gradients belong to.
    pub fn weighted_sum(&self, weights: &[f32]) -> f32 {
        weighted_sum(weights, |i| self.nll[i] as f64)
    }
}

/// Cross-entropy of `h [n, M]` projected by `w [V, M]` against `targets [n]`.
#[track_caller]
pub fn cross_entropy(h: &Tensor, w: &Tensor, targets: &[u32], weights: &[f32], grads: Wanted) -> CrossEntropy {
    queue_cross_entropy(h, w, targets, &RowWeights::of(weights, &h.device()), grads).into_cross_entropy()
}

/// [`cross_entropy`] whose losses stay where the inputs are.
#[track_caller]
pub fn queue_cross_entropy(h: &Tensor, w: &Tensor, targets: &[u32], weights: &RowWeights, grads: Wanted) -> Queued {
    check_shapes("cross_entropy", h, w, Some(targets), weights);
    if let Some(gpu) = h.gpu() {
        return cuda::cross_entropy(gpu, h, w, targets, weights, grads);
    }
    let of_rows = weights.scattered();
    let all = in_chunks(h, w, targets, &of_rows, grads, rows_per_chunk(w.shape()[0]));
    let loss = Tensor::scalar(all.weighted_sum(&of_rows));
    let figures = weights.rows().iter().flat_map(|&i| [all.nll[i], f32::from_bits(all.top1[i]), all.max_prob[i]]).collect();
    let figures = Tensor::from_vec(figures, [weights.rows().len(), 3]);
    Queued { first: loss.clone(), loss, figures, dh: all.dh, dw: all.dw, weights: weights.clone() }
}

pub(super) fn in_chunks(h: &Tensor, w: &Tensor, targets: &[u32], weights: &[f32], grads: Wanted, per_chunk: usize) -> CrossEntropy {
    let [vocab, m] = w.dims();
    let active = weighted_rows(weights);
    let per_chunk = even_chunks(active.len(), per_chunk);
    let mut gradients = Gradients::new(h, w, grads);
    let (mut nll, mut top1, mut max_prob) = (vec![0.0; weights.len()], vec![u32::MAX; weights.len()], vec![0.0; weights.len()]);
    let mut logits = Scratch::zeros(per_chunk.min(active.len()) * vocab); // [chunk, V]
    for rows in active.chunks(per_chunk) {
        let h_rows = gather(h.f32(), m, rows);
        let logits = &mut logits[..rows.len() * vocab];
        project(&h_rows, rows.len(), w, logits);
        let losses: Vec<(f32, u32, f32)> = logits
            .par_chunks_mut(vocab)
            .zip(rows)
            .map(|(z, &i)| row_loss(z, targets[i] as usize, grads.any().then_some(weights[i])))
            .collect();
        for (&i, row) in rows.iter().zip(losses) {
            (nll[i], top1[i], max_prob[i]) = row;
        }
        if grads.any() {
            gradients.add(logits, rows, &h_rows, w);
        }
    }
    CrossEntropy { nll, top1, max_prob, dh: gradients.dh, dw: gradients.dw }
}

/// Loss, best token and its probability of a row; with a weight, `z` becomes the gradient `weight (softmax(z) - onehot(target))`.
fn row_loss(z: &mut [f32], target: usize, weight: Option<f32>) -> (f32, u32, f32) {
    let (best, max) = argmax(z).map_or((u32::MAX, f32::NAN), |(i, z)| (i as u32, z));
    let sum = sum_exp(z, max);
    let nll = (max - z[target]) + sum.ln();
    if let Some(weight) = weight {
        softmax_times(z, max, weight / sum);
        z[target] -= weight;
    }
    (nll, best, 1.0 / sum)
}

vectorised! {
    /// `z = a exp(z - max)`.
    fn softmax_times(z: &mut [f32], max: f32, a: f32) {
        for z in z {
            *z = a * exp(*z - max);
        }
    }
}
