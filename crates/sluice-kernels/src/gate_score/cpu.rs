//! One pass over each row. Plain multiplications and additions over sixteen running sums: the compiler turns them
//! into vectors of whatever width the CPU has, and the result is the same on all of them.

use rayon::prelude::*;
use sluice_tensor::Tensor;

use super::RECENCY_UNIT;

const LANES: usize = 16;
/// Rows per task and per partial sum of the weight gradient; fixed, so that the result does not depend on threads.
const CHUNK: usize = 64;

pub(super) fn fwd(x: &[f32], weight: &[f32], bias: &[f32], recency: &[f32], positions: &[u32], eps: f32) -> Vec<f32> {
    let (gs, t) = (bias.len(), positions.len());
    let m = weight.len() / gs.max(1);
    let mut scores = vec![0.0; x.len() / m.max(1) * gs];
    scores.par_chunks_mut((CHUNK * gs).max(1)).enumerate().for_each(|(chunk, scores)| {
        for (i, scores) in scores.chunks_exact_mut(gs).enumerate() {
            let row = chunk * CHUNK + i;
            let x = &x[row * m..(row + 1) * m];
            let inv_rms = inv_rms(x, eps);
            let age = positions[row % t] as f32 / RECENCY_UNIT;
            for g in 0..gs {
                scores[g] = inv_rms * dot(x, &weight[g * m..(g + 1) * m]) + bias[g] + recency[g] * age;
            }
        }
    });
    scores
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
                    axpy(&mut sums[g * m..(g + 1) * m], d * inv_rms, x);
                    if want_dx {
                        let a = &w[g * m..(g + 1) * m];
                        let along_x = inv_rms * inv_rms * dot(x, a) / m as f32;
                        let dx = &mut dx[(row - chunk * CHUNK) * m..][..m];
                        for ((dx, a), x) in dx.iter_mut().zip(a).zip(x) {
                            *dx += d * inv_rms * (a - x * along_x);
                        }
                    }
                }
            }
            sums
        })
        .collect();
    let mut total = vec![0.0; gs * (m + 2)];
    for partial in &partials {
        axpy(&mut total, 1.0, partial);
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

/// Sixteen running sums, added pairwise, then the rest of the row.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0f32; LANES];
    for (a, b) in a_lanes.iter().zip(b_lanes) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums[0] + rest
}

fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}
