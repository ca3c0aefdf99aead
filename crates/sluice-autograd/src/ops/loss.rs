//! Losses. Each returns its weighted sum as a scalar; the caller normalises.

use rayon::prelude::*;
use sluice_kernels::adamw;
use sluice_kernels::output_head::{self, CrossEntropy, Distill, DistillTerms, Wanted};
use sluice_tensor::Tensor;

use crate::tape::{Tape, Var};

/// Denominators of relative errors stay above this; a row of zeros has no relative error.
const TINY: f32 = 1e-12;

impl Tape {
    /// `sum_i weights[i] nll_i` of `h [n, M]` projected by `w [V, M]`, and the figures per row. Gradients are
    /// computed with the loss, in one pass over the logits.
    #[track_caller]
    pub fn cross_entropy(&self, h: &Var, w: &Var, targets: &[u32], weights: &[f32]) -> (Var, CrossEntropy) {
        let mut rows = output_head::cross_entropy(h.value(), w.value(), targets, weights, self.wanted_of_head(h, w));
        let sum = weighted_sum(weights, |i| rows.nll[i] as f64);
        let loss = self.with_gradients(h, w, sum, rows.dh.take(), rows.dw.take());
        (loss, rows)
    }

    /// `sum_i weights[i] loss_i` of the student `h [n, M_s]`, `w [V, M_s]` against a teacher's `h_t [n, M_t]`,
    /// `w_t [V, M_t]`, and the figures per row.
    #[track_caller]
    pub fn distill(
        &self,
        h: &Var,
        w: &Var,
        h_t: &Tensor,
        w_t: &Tensor,
        targets: Option<&[u32]>,
        weights: &[f32],
        terms: DistillTerms,
    ) -> (Var, Distill) {
        let wanted = self.wanted_of_head(h, w);
        let mut rows = output_head::distill(h.value(), w.value(), h_t, w_t, targets, weights, terms, wanted);
        let sum = weighted_sum(weights, |i| {
            let nll = if terms.ce == 0.0 { 0.0 } else { rows.nll_student[i] };
            terms.kl as f64 * rows.kl[i] as f64 + terms.ce as f64 * nll as f64 + terms.boundary as f64 * rows.boundary[i] as f64
        });
        let loss = self.with_gradients(h, w, sum, rows.dh.take(), rows.dw.take());
        (loss, rows)
    }

    /// `sum_i weights[i] |a_i - b_i|^2 / |b_i|^2` over the rows of `a` and the constant `b`, both `[.., M]`.
    #[track_caller]
    pub fn weighted_mse_rows(&self, a: &Var, b: &Tensor, weights: &[f32]) -> Var {
        let (n, m) = (a.value().n_rows(), a.value().last_dim());
        assert!(
            a.value().shape() == b.shape() && weights.len() == n,
            "weighted_mse_rows of {:?} and {:?} with {} weights",
            a.value().shape(),
            b.shape(),
            weights.len()
        );
        let row_sums: Vec<(f32, f32)> = (a.value().f32().par_chunks(m.max(1)), b.f32().par_chunks(m.max(1)))
            .into_par_iter()
            .map(|(a, b)| a.iter().zip(b).fold((0.0, 0.0), |(error, norm), (a, b)| (error + (a - b) * (a - b), norm + b * b)))
            .collect();
        let sum = weighted_sum(weights, |i| row_sums[i].0 as f64 / row_sums[i].1.max(TINY) as f64);
        let factors: Vec<f32> = (0..n).map(|i| if weights[i] == 0.0 { 0.0 } else { 2.0 * weights[i] / row_sums[i].1.max(TINY) }).collect();
        let (a_value, b) = (a.value().clone(), b.clone());
        self.custom(&[a], Tensor::scalar(sum), move |dy| {
            let dy = dy.item();
            let mut da = vec![0.0; a_value.len()];
            da.par_chunks_mut(m.max(1)).zip(&factors).enumerate().filter(|(_, (_, factor))| **factor != 0.0).for_each(
                |(i, (da, factor))| {
                    let (a, b) = (&a_value.f32()[i * m..(i + 1) * m], &b.f32()[i * m..(i + 1) * m]);
                    for ((da, a), b) in da.iter_mut().zip(a).zip(b) {
                        *da = dy * factor * (a - b);
                    }
                },
            );
            vec![Some(Tensor::from_vec(da, a_value.shape()))]
        })
    }

    #[track_caller]
    fn wanted_of_head(&self, h: &Var, w: &Var) -> Wanted {
        Wanted { input: self.wants(h), weight: self.wants(w) }
    }

    /// A scalar whose gradients are known already.
    #[track_caller]
    fn with_gradients(&self, h: &Var, w: &Var, sum: f32, dh: Option<Tensor>, dw: Option<Tensor>) -> Var {
        self.custom(&[h, w], Tensor::scalar(sum), move |dy| {
            let dy = dy.item();
            [dh, dw]
                .map(|gradient| {
                    let mut gradient = gradient?;
                    if dy != 1.0 {
                        adamw::scale_in_place(&mut gradient, dy);
                    }
                    Some(gradient)
                })
                .into()
        })
    }
}

/// `sum_i weights[i] loss(i)` in f64, over the rows that count.
fn weighted_sum(weights: &[f32], loss: impl Fn(usize) -> f64) -> f32 {
    (0..weights.len()).filter(|&i| weights[i] != 0.0).map(|i| weights[i] as f64 * loss(i)).sum::<f64>() as f32
}
