//! Losses. Each returns its weighted sum as a scalar where its inputs are; the caller normalises. Backward passes take the
//! gradient of the scalar without reading it, so on a GPU nothing waits.

use sluice_kernels::output_head::{self, DistillTerms, Queued, RowWeights, Wanted};
use sluice_kernels::{adamw, weighted_mse};
use sluice_tensor::Tensor;

use crate::tape::{Tape, Var};

impl Tape {
    /// `sum_i weights[i] nll_i` of `h [n, M]` projected by `w [V, M]`, and the figures per row, to be read later. Gradients are
    /// computed with the loss, in one pass over the logits.
    #[track_caller]
    pub fn cross_entropy(&self, h: &Var, w: &Var, targets: &[u32], weights: &[f32]) -> (Var, Queued) {
        let weights = RowWeights::of(weights, &h.value().device());
        let queued = output_head::queue_cross_entropy(h.value(), w.value(), targets, &weights, self.wanted_of_head(h, w));
        self.with_gradients(h, w, queued)
    }

    /// `sum_i weights[i] loss_i` of the student `h [n, M_s]`, `w [V, M_s]` against a teacher's `h_t [n, M_t]`,
    /// `w_t [V, M_t]`, and the figures per row, to be read later.
    #[track_caller]
    pub fn distill(
        &self,
        h: &Var,
        w: &Var,
        h_t: &Tensor,
        w_t: &Tensor,
        targets: Option<&[u32]>,
        weights: &RowWeights,
        terms: DistillTerms,
    ) -> (Var, Queued) {
        let wanted = self.wanted_of_head(h, w);
        self.with_gradients(h, w, output_head::queue_distill(h.value(), w.value(), h_t, w_t, targets, weights, terms, wanted))
    }

    /// `sum_i weights[i] |a_i - b_i|^2 / |b_i|^2` over the rows of `a` and the constant `b`, both `[.., M]`; `weights [rows]`.
    #[track_caller]
    pub fn weighted_mse_rows(&self, a: &Var, b: &Tensor, weights: &Tensor) -> Var {
        let (loss, factors) = weighted_mse::fwd(a.value(), b, weights);
        let (a_value, b) = (a.value().clone(), b.clone());
        self.custom(&[a], loss, move |dy| vec![Some(weighted_mse::bwd(dy, &a_value, &b, &factors))])
    }

    #[track_caller]
    fn wanted_of_head(&self, h: &Var, w: &Var) -> Wanted {
        Wanted { input: self.wants(h), weight: self.wants(w) }
    }

    /// The loss, whose gradients are known already, and the rest.
    #[track_caller]
    fn with_gradients(&self, h: &Var, w: &Var, mut queued: Queued) -> (Var, Queued) {
        let (dh, dw) = (queued.dh.take(), queued.dw.take());
        let loss = self.custom(&[h, w], queued.loss.clone(), move |dy| {
            [dh, dw]
                .map(|gradient| {
                    let mut gradient = gradient?;
                    adamw::scale_in_place_by(&mut gradient, dy);
                    Some(gradient)
                })
                .into()
        });
        (loss, queued)
    }
}
