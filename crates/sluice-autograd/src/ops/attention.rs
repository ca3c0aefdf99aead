//! Attention: the dense form and the routed one.

use sluice_kernels::dense_attention;
use sluice_kernels::routed_attention::{GateBias, PlacedRouting};

use crate::tape::{Tape, Var};

impl Tape {
    /// Attention of `q [B, T, H, D]` to the keys that `routing` names in `k`, `v [B, S, G, D]`. With `bias`, routed keys
    /// get a bias from their scores `[B, S, G]` at this temperature; the router's `tau` is a constant.
    #[track_caller]
    pub fn routed_attention(&self, q: &Var, k: &Var, v: &Var, bias: Option<(&Var, f32)>, routing: &PlacedRouting) -> Var {
        let gate_bias = bias.map(|(scores, temperature)| GateBias { scores: scores.value(), temperature });
        let (o, lse) = routing.fwd(q.value(), k.value(), v.value(), gate_bias);
        let inputs: Vec<&Var> = [q, k, v].into_iter().chain(bias.map(|(scores, _)| scores)).collect();
        let scores_alone = ![q, k, v].into_iter().any(|input| self.wants(input));
        let kept = [q, k, v].map(|var| var.value().clone());
        let bias = bias.map(|(scores, temperature)| (scores.value().clone(), temperature));
        let (o_value, routing) = (o.clone(), routing.clone());
        self.custom(&inputs, o, move |dout| {
            let [q, k, v] = &kept;
            let gate_bias = bias.as_ref().map(|(scores, temperature)| GateBias { scores, temperature: *temperature });
            if let (true, Some(bias)) = (scores_alone, gate_bias) {
                return vec![None, None, None, Some(routing.bwd_scores(dout, q, k, v, &o_value, &lse, bias))];
            }
            let grads = routing.bwd(dout, q, k, v, &o_value, &lse, gate_bias);
            let mut gradients = vec![Some(grads.dq), Some(grads.dk), Some(grads.dv)];
            if bias.is_some() {
                gradients.push(grads.dscores);
            }
            gradients
        })
    }

    /// Dense attention of an encoder: every query of `q [B, T, H, D]` sees the first `lens[b]` rows of `k`, `v [B, T, G, D]`.
    #[track_caller]
    pub fn bidirectional_attention(&self, q: &Var, k: &Var, v: &Var, lens: &[usize]) -> Var {
        let (o, lse) = dense_attention::fwd_bidirectional(q.value(), k.value(), v.value(), lens);
        let kept = [q, k, v].map(|var| var.value().clone());
        let (o_value, lens) = (o.clone(), lens.to_vec());
        self.custom(&[q, k, v], o, move |dout| {
            let [q, k, v] = &kept;
            let (dq, dk, dv) = dense_attention::bwd_bidirectional(dout, q, k, v, &o_value, &lse, &lens);
            vec![Some(dq), Some(dk), Some(dv)]
        })
    }

    /// Dense causal attention: query `i` of `q [B, T, H, D]` is at position `start + i` and sees the rows
    /// `0..=start + i` of `k`, `v [B, S, G, D]`.
    #[track_caller]
    pub fn dense_attention(&self, q: &Var, k: &Var, v: &Var, start: usize, lens: &[usize]) -> Var {
        let (o, lse) = dense_attention::fwd(q.value(), k.value(), v.value(), start, lens);
        let kept = [q, k, v].map(|var| var.value().clone());
        let (o_value, lens) = (o.clone(), lens.to_vec());
        self.custom(&[q, k, v], o, move |dout| {
            let [q, k, v] = &kept;
            let (dq, dk, dv) = dense_attention::bwd(dout, q, k, v, &o_value, &lse, start, &lens);
            vec![Some(dq), Some(dk), Some(dv)]
        })
    }
}
