//! One pass over each row. The sums of `vector_math` run in fixed lanes, so they are the same on every CPU.

use rayon::prelude::*;
use sluice_tensor::Tensor;

use super::RECENCY_UNIT;
use crate::vector_math::{add_assign, axpy, dot, vectorised};

/// Rows per task and per partial sum of the weight gradient; fixed, so that the result does not depend on threads.
const CHUNK: usize = 64;

pub(super) fn fwd(x: &[f32], weight: &[f32], bias: &[f32], recency: &[f32], positions: &[u32], eps: f32) -> Vec<f32> {
    let (gs, t) = (bias.len(), positions.len());
    let m = weight.len() / gs.max(1);
    let mut scores = vec![0.0; x.len() / m.max(1) * gs];
    scores.par_chunks_mut((CHUNK * gs).max(1)).enumerate().for_each(|(chunk, scores)| {
        for (i, scores) in scores.chunks_exact_mut(gs).enumerate() {
            let row = chunk * CHUNK + i;
            fwd_token(&x[row * m..(row + 1) * m], weight, bias, recency, positions[row % t], eps, scores);
        }
    });
    scores
}

/// Scores `[Gs]` of one token.
pub(super) fn fwd_token(x: &[f32], weight: &[f32], bias: &[f32], recency: &[f32], position: u32, eps: f32, scores: &mut [f32]) {
    let m = x.len();
    let inv_rms = inv_rms(x, eps);
    let age = position as f32 / RECENCY_UNIT;
    for (g, score) in scores.iter_mut().enumerate() {
        *score = inv_rms * dot(x, &weight[g * m..(g + 1) * m]) + bias[g] + recency[g] * age;
    }
}

pub(super) fn bwd(
    dscores: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    positions: &[u32],
    eps: f32,
    want_dx: bool,
) -> (Tensor, Tensor, Tensor, Option<Tensor>) {
    let [gs, m] = weight.dims();
    let t = positions.len();
    let n = dscores.n_rows();
    let (ds, xs, w) = (dscores.f32(), x.f32(), weight.f32());
    let mut dx = vec![0.0; if want_dx { n * m } else { 0 }];
    let n_chunks = n.div_ceil(CHUNK);
    // Without dx every task gets an empty slice.
    let mut dx_chunks: Vec<&mut [f32]> = if want_dx { dx.chunks_mut(CHUNK * m).collect() } else { vec![] };
    dx_chunks.resize_with(n_chunks, Default::default);
    let partials: Vec<Vec<f32>> = dx_chunks
        .into_par_iter()
        .enumerate()
        .map(|(chunk, dx)| {
            // [Gs, M] dweight, [Gs] dbias, [Gs] drecency.
            let mut sums = vec![0.0; gs * (m + 2)];
            for row in chunk * CHUNK..((chunk + 1) * CHUNK).min(n) {
                let x = &xs[row * m..(row + 1) * m];
                let inv_rms = inv_rms(x, eps);
                let age = positions[row % t] as f32 / RECENCY_UNIT;
                for g in 0..gs {
                    let d = ds[row * gs + g];
                    // A score without a gradient (evicted and outside the loss) is the usual case.
                    if d == 0.0 {
                        continue;
                    }
                    sums[gs * m + g] += d;
                    sums[gs * (m + 1) + g] += d * age;
                    axpy(d * inv_rms, x, &mut sums[g * m..(g + 1) * m]);
                    if want_dx {
                        let a = &w[g * m..(g + 1) * m];
                        let along_x = inv_rms * inv_rms * dot(x, a) / m as f32;
                        let dx = &mut dx[(row - chunk * CHUNK) * m..][..m];
                        add_input_gradient(dx, d * inv_rms, a, x, along_x);
                    }
                }
            }
            sums
        })
        .collect();
    let mut total = vec![0.0; gs * (m + 2)];
    for partial in &partials {
        add_assign(&mut total, partial);
    }
    (
        Tensor::from_vec(total[..gs * m].to_vec(), [gs, m]),
        Tensor::from_vec(total[gs * m..gs * (m + 1)].to_vec(), [gs]),
        Tensor::from_vec(total[gs * (m + 1)..].to_vec(), [gs]),
        want_dx.then(|| Tensor::from_vec(dx, x.shape())),
    )
}

fn inv_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

vectorised! {
    /// `dx += factor (a - along_x x)`.
    fn add_input_gradient(dx: &mut [f32], factor: f32, a: &[f32], x: &[f32], along_x: f32) {
        for ((dx, a), x) in dx.iter_mut().zip(a).zip(x) {
            *dx = factor.mul_add(x.mul_add(-along_x, *a), *dx);
        }
    }
}
