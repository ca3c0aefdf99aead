//! Ops with a weight matrix: linear layers, the embedding and the gate.

use sluice_kernels::{embedding, gate_score, linear};

use super::wanted;
use crate::tape::{Tape, Var};

impl Tape {
    /// `x w^T + b`: `x [.., K]`, `w [N, K]`, `bias [N]`, result `[.., N]`.
    #[track_caller]
    pub fn linear(&self, x: &Var, w: &Var, bias: Option<&Var>) -> Var {
        let y = linear::fwd(x.value(), w.value(), bias.map(Var::value));
        let (wants_x, wants_w, wants_bias) = (self.wants(x), self.wants(w), bias.is_some_and(|b| self.wants(b)));
        // Each side of the product is kept for the gradient of the other one only.
        let kept_x = wants_w.then(|| x.value().clone());
        let kept_w = wants_x.then(|| w.value().clone());
        let inputs: Vec<&Var> = [x, w].into_iter().chain(bias).collect();
        let n_inputs = inputs.len();
        self.custom_onto(&inputs, y, move |dy, before| {
            let mut gradients = vec![
                kept_w.map(|w| linear::bwd_input_onto(before, dy, &w)),
                kept_x.map(|x| linear::bwd_weight(dy, &x)),
                wanted(wants_bias, || linear::bwd_bias(dy)),
            ];
            gradients.truncate(n_inputs);
            gradients
        })
    }

    /// Rows of `table [V, M]`: result `[n, M]`.
    #[track_caller]
    pub fn embedding(&self, tokens: &[u32], table: &Var) -> Var {
        let y = embedding::fwd(tokens, table.value());
        let tokens = tokens.to_vec();
        self.custom_in_place(table, y, move |dy, dtable| embedding::bwd(dy, &tokens, dtable))
    }

    /// Gate scores `[B, T, Gs]` of `x [B, T, M]`: `weight [Gs, M]`, `bias [Gs]`, `recency [Gs]`; `positions` has one
    /// entry per row of a sequence.
    #[track_caller]
    pub fn gate_score(&self, x: &Var, weight: &Var, bias: &Var, recency: &Var, positions: &[u32], eps: f32) -> Var {
        let scores = gate_score::fwd(x.value(), weight.value(), bias.value(), recency.value(), positions, eps);
        let wants_x = self.wants(x);
        let (x_value, w_value, positions) = (x.value().clone(), weight.value().clone(), positions.to_vec());
        self.custom(&[x, weight, bias, recency], scores, move |dscores| {
            let (dweight, dbias, drecency, dx) = gate_score::bwd(dscores, &x_value, &w_value, &positions, eps, wants_x);
            vec![dx, Some(dweight), Some(dbias), Some(drecency)]
        })
    }
}
