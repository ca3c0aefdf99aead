//! Rows whose loss counts and what is known of them, where the inputs are: on a GPU the weights may have been computed there, and losses
//! stay there until somebody reads them.

use std::sync::Arc;

use sluice_tensor::{Device, Tensor};

use super::distill::RowLosses;
use super::{CrossEntropy, Distill, weighted_rows};

/// Rows of a batch whose loss counts, and their weights.
#[derive(Clone)]
pub struct RowWeights {
    n: usize,
    rows: Arc<[usize]>,
    values: Tensor,
}

impl RowWeights {
    /// The rows of `weights [n]` that are not 0, for inputs on a device.
    pub fn of(weights: &[f32], device: &Device) -> Self {
        let rows: Arc<[usize]> = weighted_rows(weights).into();
        let values = Tensor::from_vec(rows.iter().map(|&i| weights[i]).collect(), [rows.len()]).to(device);
        Self { n: weights.len(), rows, values }
    }

    /// The same rows with other weights `[rows]`. One that is 0 takes part as far as it has to: its loss and gradients are 0.
    #[track_caller]
    pub fn with_values(&self, values: Tensor) -> Self {
        assert_eq!(values.shape(), [self.rows.len()], "weights of {} rows", self.rows.len());
        Self { values, ..self.clone() }
    }

    /// Rows of the batch.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The rows that count, ascending.
    pub fn rows(&self) -> &[usize] {
        &self.rows
    }

    /// Their weights `[rows]`.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// Weights `[n]` of all rows in main memory.
    pub(super) fn scattered(&self) -> Vec<f32> {
        let mut all = vec![0.0; self.n];
        for (&row, &weight) in self.rows.iter().zip(self.values.f32()) {
            all[row] = weight;
        }
        all
    }
}

/// Losses and gradients where the inputs are; nothing was read yet.
pub struct Queued {
    /// `sum_i weights[i] loss_i`, `[]`: what the gradients belong to.
    pub loss: Tensor,
    /// The same sum of the first term alone, without its factor, `[]`: the KL, or the negative log-likelihood.
    pub first: Tensor,
    /// Figures of the rows that count: `[rows, 3]` after [`super::queue_cross_entropy`], negative log-likelihood, bits of the most likely
    /// token and its probability; `[rows, 6]` after [`super::queue_distill`], KL, boundary loss, both likelihoods, bits of "both
    /// agree" and of the student's most likely token.
    pub figures: Tensor,
    /// `[n, M]`.
    pub dh: Option<Tensor>,
    /// `[V, M]`.
    pub dw: Option<Tensor>,
    pub(super) weights: RowWeights,
}

impl Queued {
    /// The rows that the figures belong to, with their weights.
    pub fn weights(&self) -> &RowWeights {
        &self.weights
    }

    fn read<const N: usize>(&self) -> impl Iterator<Item = (usize, [f32; N])> {
        let figures = self.figures.to(&Device::Cpu).into_vec();
        let rows = self.weights.rows.clone();
        (0..rows.len()).map(move |i| (rows[i], std::array::from_fn(|k| figures[i * N + k])))
    }

    /// What is known of every row, in main memory: on a GPU the host waits for it.
    pub fn into_cross_entropy(self) -> CrossEntropy {
        let n = self.weights.n;
        let (mut nll, mut top1, mut max_prob) = (vec![0.0; n], vec![u32::MAX; n], vec![0.0; n]);
        for (row, figures) in self.read::<3>() {
            (nll[row], top1[row], max_prob[row]) = (figures[0], figures[1].to_bits(), figures[2]);
        }
        CrossEntropy { nll, top1, max_prob, dh: self.dh, dw: self.dw }
    }

    /// The same of a distillation.
    pub fn into_distill(self, with_targets: bool) -> Distill {
        let mut all = vec![RowLosses::default(); self.weights.n];
        for (row, [kl, boundary, nll_student, nll_teacher, agree, top1]) in self.read::<6>() {
            all[row] = RowLosses { kl, boundary, nll_student, nll_teacher, agree: agree.to_bits() != 0, top1_student: top1.to_bits() };
        }
        RowLosses::into_distill(all, with_targets, self.dh, self.dw)
    }
}
