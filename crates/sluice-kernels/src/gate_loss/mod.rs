//! Losses that act on the gate's scores alone, and their gradient, in one pass: ranking against a label, spread, smoothness.
//!
//! All three look at the *content* part of a score, `x_j = s_j - c j / 1024`: the label counts the readers of a key within a
//! fixed horizon after it left the window, whatever its age, so comparing it with a score that grows with position would
//! unlearn the slope.

pub(crate) mod cases;
mod cpu;
mod cuda;
pub mod naive;
#[cfg(test)]
mod tests;

use sluice_tensor::Tensor;

/// Weights of the terms; each is a mean over keys and heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms {
    /// Binary cross-entropy between `sigmoid(x - tau)` and "the label is among the best".
    pub rank: f32,
    /// `(x - mean x)^2`.
    pub spread: f32,
    /// `(x_j - x_{j+1})^2`.
    pub smooth: f32,
}

/// Labels of sampled keys of one sequence.
pub struct RankLabels<'a> {
    /// Sampled positions, strictly ascending.
    pub positions: &'a [u32],
    /// `[n, G]` future attention, where the scores are.
    pub labels: &'a Tensor,
    /// Share of the keys that the budget keeps.
    pub keep: f32,
}

impl RankLabels<'_> {
    /// How many of the sampled keys the budget keeps: at least one.
    fn n_kept(&self) -> usize {
        let n = self.positions.len();
        ((self.keep * n as f32).round() as usize).clamp(1, n.max(1))
    }
}

/// `(loss [], dscores [B, T, G])` of the first `lens[b]` of `scores [B, T, G]` with recency `slopes [G]` or `[1]`, all on one device; the sum
/// over the sequences, each of which has a mean of its own. `ranks` has an element per sequence.
///
/// `tau` is the content of the key at the place where the budget ends, per head: a constant of the gradient.
#[track_caller]
pub fn fwd(scores: &Tensor, lens: &[usize], slopes: &Tensor, ranks: &[Option<RankLabels<'_>>], terms: &Terms) -> (Tensor, Tensor) {
    let [b, t, g] = scores.dims();
    assert!(
        lens.len() == b && ranks.len() == b && lens.iter().all(|&len| len <= t) && (slopes.len() == g || slopes.len() == 1),
        "gate_loss of scores {:?} with lengths {lens:?}, {} rankings and {} slopes",
        scores.shape(),
        ranks.len(),
        slopes.len()
    );
    for (&len, RankLabels { positions, labels, .. }) in lens.iter().zip(ranks).filter_map(|(len, rank)| Some((len, rank.as_ref()?))) {
        assert_eq!(
            labels.shape(),
            [positions.len(), g],
            "gate_loss: labels of {} positions with scores {:?}",
            positions.len(),
            scores.shape()
        );
        let ascending = positions.windows(2).all(|w| w[0] < w[1]) && positions.last().is_none_or(|&p| (p as usize) < len);
        assert!(ascending, "gate_loss: positions must ascend and lie in scores {:?}", scores.shape());
    }
    match scores.gpu() {
        Some(gpu) => cuda::fwd(gpu, scores, lens, slopes, ranks, terms),
        None => cpu::fwd(scores, lens, slopes, ranks, terms),
    }
}
