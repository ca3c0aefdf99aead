//! Losses fused with the projection onto the vocabulary: `z = h w^T`, `h [n, M]`, `w [V, M]`, `z [n, V]`.
//!
//! Logits exist for one chunk of rows at a time (at most 64 MiB a side) and are turned into their own gradient
//! in place. `weights[i]` multiplies the loss of row `i`; gradients are of `sum_i weights[i] loss_i`, so the
//! caller normalises. Rows of weight 0 cost nothing and report 0.

pub(crate) mod cases;
mod cross_entropy;
mod cuda;
mod distill;
pub mod naive;
mod rows;
#[cfg(test)]
mod tests;

use std::borrow::Cow;

pub use cross_entropy::{CrossEntropy, cross_entropy, queue_cross_entropy};
pub use distill::{Distill, DistillTerms, distill, queue_distill};
pub use rows::{Queued, RowWeights};
use sluice_tensor::Tensor;

use crate::linear::{self, project_back, weight_gradient};

/// Which gradients to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Of `h`.
    pub input: bool,
    /// Of `w`.
    pub weight: bool,
}

impl Wanted {
    /// None: only the loss.
    pub const NOTHING: Self = Self { input: false, weight: false };

    fn any(self) -> bool {
        self.input || self.weight
    }
}

/// Plain logits `[n, V]`, for the few rows of a decoding step.
#[track_caller]
pub fn logits(h: &Tensor, w: &Tensor) -> Tensor {
    linear::fwd_f32(h, w)
}

/// Bytes of logits that stay in a last-level cache between their three matrix products.
const CACHED_BYTES: usize = 4 << 20;
/// Rows that make reading all of `w`, and its gradient, worth while.
const WORTHWHILE_ROWS: usize = 256;
/// Bytes of logits held at a time, whatever the vocabulary.
const CHUNK_BYTES: usize = 64 << 20;

fn rows_per_chunk(vocab: usize) -> usize {
    let rows_of = |bytes: usize| bytes / 4 / vocab.max(1);
    rows_of(CACHED_BYTES).max(WORTHWHILE_ROWS).min(rows_of(CHUNK_BYTES)).max(1)
}

/// Most bytes of logits that exist at a time on a GPU.
pub const GPU_CHUNK_BYTES: usize = cuda::CHUNK_BYTES;

/// Rows whose logits exist at a time when `n` rows have a loss.
pub fn chunk_rows(n: usize, vocab: usize) -> usize {
    even_chunks(n, rows_per_chunk(vocab)).min(n)
}

/// The number of rows per chunk when `n` rows go through in as few chunks of at most `at_most` as possible: even ones, since a
/// last chunk of two rows reads all weights like any other.
fn even_chunks(n: usize, at_most: usize) -> usize {
    n.div_ceil(n.div_ceil(at_most).max(1)).max(1)
}

/// `sum_i weights[i] loss(i)` in f64, over the rows that count.
fn weighted_sum(weights: &[f32], loss: impl Fn(usize) -> f64) -> f32 {
    weighted_rows(weights).into_iter().map(|i| weights[i] as f64 * loss(i)).sum::<f64>() as f32
}

/// Rows whose loss counts.
fn weighted_rows(weights: &[f32]) -> Vec<usize> {
    (0..weights.len()).filter(|&i| weights[i] != 0.0).collect()
}

/// The given ascending rows of `x [n, M]`, without a copy when they are neighbours.
fn gather<'a>(x: &'a [f32], m: usize, rows: &[usize]) -> Cow<'a, [f32]> {
    match neighbours(rows) {
        Some(first) => Cow::Borrowed(&x[first * m..(first + rows.len()) * m]),
        None => Cow::Owned(rows.iter().flat_map(|&i| &x[i * m..(i + 1) * m]).copied().collect()),
    }
}

/// The first of ascending rows if there is no gap between them.
fn neighbours(rows: &[usize]) -> Option<usize> {
    let (first, last) = (*rows.first()?, *rows.last()?);
    (last - first + 1 == rows.len()).then_some(first)
}

/// `dh [n, M]` and `dw [V, M]` as they grow chunk by chunk.
struct Gradients {
    dh: Option<Tensor>,
    dw: Option<Tensor>,
    /// Nothing was added yet, so nothing need be read.
    is_zero: bool,
}

impl Gradients {
    fn new(h: &Tensor, w: &Tensor, wanted: Wanted) -> Self {
        Self { dh: wanted.input.then(|| Tensor::zeros(h.shape())), dw: wanted.weight.then(|| Tensor::zeros(w.shape())), is_zero: true }
    }

    /// Take in the gradient of the logits of `rows`, whose inputs are `h_rows`.
    fn add(&mut self, dlogits: &[f32], rows: &[usize], h_rows: &[f32], w: &Tensor) {
        let [vocab, m] = w.dims();
        if let Some(dh) = &mut self.dh {
            let dh = dh.f32_mut();
            if let Some(first) = neighbours(rows) {
                project_back(dlogits, rows.len(), w, &mut dh[first * m..(first + rows.len()) * m]);
            } else {
                let mut dh_rows = vec![0.0; rows.len() * m];
                project_back(dlogits, rows.len(), w, &mut dh_rows);
                for (k, &i) in rows.iter().enumerate() {
                    dh[i * m..(i + 1) * m].copy_from_slice(&dh_rows[k * m..(k + 1) * m]);
                }
            }
        }
        if let Some(dw) = &mut self.dw {
            weight_gradient(dlogits, h_rows, rows.len(), dw.f32_mut(), (vocab, m), !self.is_zero);
        }
        self.is_zero = false;
    }
}

#[track_caller]
fn check_shapes(what: &str, h: &Tensor, w: &Tensor, targets: Option<&[u32]>, weights: &RowWeights) {
    let ([n, m], [vocab, m_w]) = (h.dims(), w.dims());
    assert!(
        m == m_w && weights.n() == n && targets.is_none_or(|t| t.len() == n),
        "{what} of h {:?}, w {:?}, {:?} targets and {} weights",
        h.shape(),
        w.shape(),
        targets.map(<[u32]>::len),
        weights.n()
    );
    if let Some(&i) = targets.and_then(|t| weights.rows().iter().find(|&&i| t[i] as usize >= vocab)) {
        panic!("{what}: target {} of row {i} is outside a vocabulary of {vocab}", targets.unwrap_or_default()[i]);
    }
}
