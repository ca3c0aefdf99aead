//! Losses that act on the gate's scores alone. A hard top-k gives evicted keys no gradient through the attention,
//! so a ranking loss against the label of stage 0 stays on through all stages.

use sluice_autograd::{Tape, Var};
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
        Self { rank: 0.1, spread: 1e-3, smooth: 0.0025 }
    }
}

/// Labels of sampled keys of one sequence.
pub struct RankLabels<'a> {
    /// Sampled positions, ascending.
    pub positions: &'a [u32],
    /// `[n, G]` future attention.
    pub labels: &'a Tensor,
    /// Share of the keys that the budget keeps.
    pub keep: f32,
}

/// `rank L_rank + spread .. + smooth ..` of scores `[1, T, G]`, mean over keys and heads.
///
/// All three look at the *content* part of a score: the label counts the readers of a key within a fixed horizon after
/// it left the window, whatever its age, so comparing it with a score that grows with position would unlearn the slope.
pub fn gate_loss(tape: &Tape, scores: &Var, slopes: &[f32], rank: Option<RankLabels<'_>>, terms: &GateLossTerms) -> Var {
    let [_, t, g] = scores.value().dims();
    let slope = |head: usize| slopes[head.min(slopes.len() - 1)];
    let content: Vec<f32> = scores.value().f32().iter().enumerate().map(|(i, s)| s - slope(i % g) * (i / g) as f32 / 1024.0).collect();
    let mut loss = 0.0f64;
    let mut grad = vec![0.0f32; t * g];
    for head in 0..g {
        let at = |j: usize| content[j * g + head];
        let mean = (0..t).map(|j| at(j) as f64).sum::<f64>() / t as f64;
        let scale = 1.0 / (t * g) as f32;
        for j in 0..t {
            let centred = at(j) - mean as f32;
            loss += (terms.spread * scale * centred * centred) as f64;
            grad[j * g + head] += 2.0 * terms.spread * scale * centred; // the mean's own gradient sums to zero
            if j + 1 < t {
                let step = at(j) - at(j + 1);
                loss += (terms.smooth * scale * step * step) as f64;
                grad[j * g + head] += 2.0 * terms.smooth * scale * step;
                grad[(j + 1) * g + head] -= 2.0 * terms.smooth * scale * step;
            }
        }
        if let Some(RankLabels { positions, labels, keep }) = &rank {
            let n = positions.len();
            let n_kept = ((keep * n as f32).round() as usize).clamp(1, n.max(1));
            let label = |i: usize| labels.f32()[i * g + head];
            let label_threshold = nth_largest((0..n).map(label).collect(), n_kept);
            let tau = nth_largest(positions.iter().map(|&p| at(p as usize)).collect(), n_kept);
            for (i, &position) in positions.iter().enumerate() {
                let z = at(position as usize) - tau;
                let target = if label(i) >= label_threshold { 1.0 } else { 0.0 };
                let scale = terms.rank / (n * g) as f32;
                loss += (scale * (softplus(z) - target * z)) as f64;
                grad[position as usize * g + head] += scale * (sigmoid(z) - target);
            }
        }
    }
    let grad = Tensor::from_vec(grad, [1, t, g]);
    tape.custom(&[scores], Tensor::scalar(loss as f32), move |upstream| {
        let mut grad = grad;
        sluice_kernels::adamw::scale_in_place(&mut grad, upstream.item());
        vec![Some(grad)]
    })
}

fn nth_largest(mut values: Vec<f32>, n: usize) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    let (_, nth, _) = values.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a));
    *nth
}

fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + (-z).exp())
}

fn softplus(z: f32) -> f32 {
    z.max(0.0) + (-z.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_testkit::{Rng, check_gradient};

    #[test]
    fn gradient_equals_finite_differences_away_from_the_threshold() {
        let (t, g) = (40, 2);
        let mut rng = Rng::new(3);
        let scores = rng.normal_tensor([1, t, g]);
        let positions: Vec<u32> = (2..30).step_by(3).collect();
        let labels = rng.normal_tensor([positions.len(), g]);
        let slopes = [0.5, 2.0];
        // Without the ranking term every key may be probed; its threshold is a constant of the gradient by design.
        let terms = GateLossTerms { rank: 0.0, spread: 0.3, smooth: 0.2 };
        let loss = |s: &Tensor| {
            let tape = Tape::frozen();
            gate_loss(&tape, &tape.constant(s.clone()), &slopes, None, &terms).value().item() as f64
        };
        let tape = Tape::recording();
        let leaf = tape.leaf(scores.clone());
        let out = gate_loss(&tape, &leaf, &slopes, None, &terms);
        let grads = tape.backward_scalar(&out);
        check_gradient("spread and smooth", &scores, grads.of(&leaf).unwrap(), 1e-2, 2e-2, 30, loss);

        let terms = GateLossTerms { rank: 1.0, spread: 0.0, smooth: 0.0 };
        let tape = Tape::recording();
        let leaf = tape.leaf(scores.clone());
        let rank = RankLabels { positions: &positions, labels: &labels, keep: 0.3 };
        let out = gate_loss(&tape, &leaf, &slopes, Some(rank), &terms);
        let grads = tape.backward_scalar(&out);
        let grad = grads.of(&leaf).unwrap();
        // Descending the ranking loss must raise keys with the best labels and lower the worst.
        for head in 0..g {
            let label = |i: usize| labels.f32()[i * g + head];
            let order = |a: &usize, b: &usize| label(*a).total_cmp(&label(*b));
            let best = (0..positions.len()).max_by(order).unwrap();
            let worst = (0..positions.len()).min_by(order).unwrap();
            assert!(grad.f32()[positions[best] as usize * g + head] < 0.0);
            assert!(grad.f32()[positions[worst] as usize * g + head] > 0.0);
        }
    }
}
