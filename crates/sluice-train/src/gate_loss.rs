//! Losses that act on the gate's scores alone. A hard top-k gives evicted keys no gradient through the attention; a ranking
//! loss against the label of stage 0 can stand in for it. Where keys beyond the budget fade out instead (`schedule.overhang`)
//! it does harm, so it is off unless asked for.

use sluice_autograd::{Tape, Var};
use sluice_kernels::adamw;
pub use sluice_kernels::gate_loss::RankLabels;
use sluice_kernels::gate_loss::{self, Terms};
use sluice_tensor::Tensor;

/// Weights of the terms.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GateLossTerms {
    /// `L_rank`: binary cross-entropy between `sigmoid(s - tau)` and "the label is among the best".
    pub rank: f32,
    /// `(s - mean s)^2`: only differences matter to a top-k, so without it scores drift.
    pub spread: f32,
    /// `(s_j - s_{j+1})^2`: neighbours should agree (Locret, arXiv 2410.01805).
    pub smooth: f32,
}

impl Default for GateLossTerms {
    fn default() -> Self {
        Self { rank: 0.0, spread: 1e-3, smooth: 0.0025 }
    }
}

/// `rank L_rank + spread .. + smooth ..` of the first `lens[b]` scores `[B, T, G]`: the sum over the sequences of the means over keys and heads
/// ([`gate_loss::fwd`]). `slopes` are the gate's, `ranks` has an element per sequence.
#[track_caller]
pub fn gate_loss(
    tape: &Tape,
    scores: &Var,
    lens: &[usize],
    slopes: &Tensor,
    ranks: &[Option<RankLabels<'_>>],
    terms: &GateLossTerms,
) -> Var {
    let &GateLossTerms { rank: of_rank, spread, smooth } = terms;
    let (loss, grad) = gate_loss::fwd(scores.value(), lens, slopes, ranks, &Terms { rank: of_rank, spread, smooth });
    tape.custom(&[scores], loss, move |upstream| {
        let mut grad = grad;
        adamw::scale_in_place_by(&mut grad, upstream);
        vec![Some(grad)]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_testkit::{Rng, check_gradient};

    #[test]
    fn gradient_of_a_scaled_loss_equals_finite_differences() {
        let (scores, slopes) = (Rng::new(3).normal_tensor([1, 40, 2]), Tensor::from_vec(vec![0.5, 2.0], [2]));
        let terms = GateLossTerms { rank: 0.0, spread: 0.3, smooth: 0.2 };
        let loss = |tape: &Tape, s: &Var| tape.scale(&gate_loss(tape, s, &[40], &slopes, &[None], &terms), 0.25);
        let tape = Tape::recording();
        let leaf = tape.leaf(scores.clone());
        let grads = tape.backward_scalar(&loss(&tape, &leaf));
        check_gradient("spread and smooth", &scores, grads.of(&leaf).unwrap(), 1e-2, 2e-2, 30, |s| {
            let tape = Tape::frozen();
            loss(&tape, &tape.constant(s.clone())).value().item() as f64
        });
    }
}
