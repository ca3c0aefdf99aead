//! Losses of a student against a teacher with the same vocabulary: forward KL, decision boundary and
//! cross-entropy, in one pass over each pair of logit rows.

use rayon::prelude::*;
use sluice_tensor::Tensor;
use sluice_tensor::memory::Scratch;

use super::{Gradients, Queued, RowWeights, Wanted, check_shapes, cuda, even_chunks, gather, rows_per_chunk, weighted_rows, weighted_sum};
use crate::linear::project;
use crate::vector_math::{LANES, add_lanes, argmax, exp, max, sum_exp, vectorised};

/// What the loss of a row is made of: `kl * KL + ce * NLL + boundary * L_DB`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DistillTerms {
    /// Factor of `temperature^2 KL(p_T || p_S)`.
    pub kl: f32,
    /// Factor of the student's negative log-likelihood of the target.
    pub ce: f32,
    /// Factor of the decision-boundary loss.
    pub boundary: f32,
    /// Both distributions of the KL are `softmax(z / temperature)`.
    pub temperature: f32,
    /// Teacher margins beyond this ask no more of the student.
    pub margin_cap: f32,
    /// Lead of the teacher's top token over its second at which a row counts half for the boundary.
    pub boundary_delta: f32,
    /// How sharply rows stop counting around `boundary_delta`.
    pub boundary_width: f32,
}

impl Default for DistillTerms {
    fn default() -> Self {
        Self { kl: 1.0, ce: 0.0, boundary: 0.1, temperature: 1.0, margin_cap: 5.0, boundary_delta: 2.0, boundary_width: 0.5 }
    }
}

/// Losses per row, without factors and weights, and the gradients that were asked for.
/// Rows of weight 0 report 0 and `false`.
pub struct Distill {
    /// `temperature^2 KL(p_T || p_S)`: the teacher's distribution comes first.
    pub kl: Vec<f32>,
    /// `omega max(0, min(m_T, cap) - m_S)^2`.
    pub boundary: Vec<f32>,
    /// Student's negative log-likelihood of the target at temperature 1; empty without targets.
    pub nll_student: Vec<f32>,
    /// The same of the teacher.
    pub nll_teacher: Vec<f32>,
    /// Whether both have the same most likely token.
    pub agree: Vec<bool>,
    /// The student's most likely token, the lowest among equals.
    pub top1_student: Vec<u32>,
    /// `[n, M_s]`.
    pub dh: Option<Tensor>,
    /// `[V, M_s]`.
    pub dw: Option<Tensor>,
}

impl Distill {
    /// `sum_i weights[i] loss_i` with the factors of `terms`: the loss that the gradients belong to.
    pub fn weighted_sum(&self, weights: &[f32], terms: &DistillTerms) -> f32 {
        weighted_sum(weights, |i| {
            let nll = if terms.ce == 0.0 { 0.0 } else { self.nll_student[i] };
            terms.kl as f64 * self.kl[i] as f64 + terms.ce as f64 * nll as f64 + terms.boundary as f64 * self.boundary[i] as f64
        })
    }
}

/// Student `h_s [n, M_s]`, `w_s [V, M_s]` against teacher `h_t [n, M_t]`, `w_t [V, M_t]`.
///
/// Boundary loss: `a` = the teacher's top token, `c` = the student's best other token, margins
/// `m = z[a] - z[c]`, `omega = sigmoid((delta - (teacher's first minus second)) / width)`. `omega`, `a` and
/// `c` are constants for the gradient.
#[track_caller]
pub fn distill(
    h_s: &Tensor,
    w_s: &Tensor,
    h_t: &Tensor,
    w_t: &Tensor,
    targets: Option<&[u32]>,
    weights: &[f32],
    terms: DistillTerms,
    grads: Wanted,
) -> Distill {
    let weights = RowWeights::of(weights, &h_s.device());
    queue_distill(h_s, w_s, h_t, w_t, targets, &weights, terms, grads).into_distill(targets.is_some())
}

/// [`distill`] whose losses stay where the inputs are.
#[track_caller]
pub fn queue_distill(
    h_s: &Tensor,
    w_s: &Tensor,
    h_t: &Tensor,
    w_t: &Tensor,
    targets: Option<&[u32]>,
    weights: &RowWeights,
    terms: DistillTerms,
    grads: Wanted,
) -> Queued {
    check_shapes("distill (student)", h_s, w_s, targets, weights);
    check_shapes("distill (teacher)", h_t, w_t, targets, weights);
    assert_eq!(w_s.shape()[0], w_t.shape()[0], "distill: student w {:?} and teacher w {:?}", w_s.shape(), w_t.shape());
    assert!(terms.ce == 0.0 || targets.is_some(), "distill: a cross-entropy term needs targets");
    assert!(terms.temperature > 0.0, "distill: temperature {} is not positive", terms.temperature);
    if let Some(gpu) = h_s.gpu() {
        return cuda::distill(gpu, [h_s, w_s, h_t, w_t], targets, weights, terms, grads);
    }
    let of_rows = weights.scattered();
    let all = in_chunks(h_s, w_s, h_t, w_t, targets, &of_rows, terms, grads, rows_per_chunk(w_s.shape()[0]));
    let [loss, first] =
        [&terms, &DistillTerms { kl: 1.0, ce: 0.0, boundary: 0.0, ..terms }].map(|t| Tensor::scalar(all.weighted_sum(&of_rows, t)));
    let nll = |of: &[f32], i: usize| of.get(i).copied().unwrap_or(0.0);
    let of_row = |&i: &usize| {
        let likelihoods = [nll(&all.nll_student, i), nll(&all.nll_teacher, i)];
        [
            all.kl[i],
            all.boundary[i],
            likelihoods[0],
            likelihoods[1],
            f32::from_bits(all.agree[i].into()),
            f32::from_bits(all.top1_student[i]),
        ]
    };
    let figures = Tensor::from_vec(weights.rows().iter().flat_map(of_row).collect(), [weights.rows().len(), 6]);
    Queued { loss, first, figures, dh: all.dh, dw: all.dw, weights: weights.clone() }
}

pub(super) fn in_chunks(
    h_s: &Tensor,
    w_s: &Tensor,
    h_t: &Tensor,
    w_t: &Tensor,
    targets: Option<&[u32]>,
    weights: &[f32],
    terms: DistillTerms,
    grads: Wanted,
    per_chunk: usize,
) -> Distill {
    let ([vocab, m_s], [_, m_t]) = (w_s.dims(), w_t.dims());
    let active = weighted_rows(weights);
    let per_chunk = even_chunks(active.len(), per_chunk);
    let mut gradients = Gradients::new(h_s, w_s, grads);
    let mut all = vec![RowLosses::default(); weights.len()];
    let scratch_len = per_chunk.min(active.len()) * vocab;
    let (mut z_s, mut z_t) = (Scratch::zeros(scratch_len), Scratch::zeros(scratch_len)); // [chunk, V]
    for rows in active.chunks(per_chunk) {
        let (h_s_rows, h_t_rows) = (gather(h_s.f32(), m_s, rows), gather(h_t.f32(), m_t, rows));
        let (z_s, z_t) = (&mut z_s[..rows.len() * vocab], &mut z_t[..rows.len() * vocab]);
        project(&h_s_rows, rows.len(), w_s, z_s);
        project(&h_t_rows, rows.len(), w_t, z_t);
        let losses: Vec<RowLosses> = (z_s.par_chunks_mut(vocab), z_t.par_chunks(vocab), rows)
            .into_par_iter()
            .map(|(z_s, z_t, &i)| row_losses(z_s, z_t, targets.map(|t| t[i] as usize), &terms, grads.any().then_some(weights[i])))
            .collect();
        for (&i, losses) in rows.iter().zip(losses) {
            all[i] = losses;
        }
        if grads.any() {
            gradients.add(z_s, rows, &h_s_rows, w_s);
        }
    }
    RowLosses::into_distill(all, targets.is_some(), gradients.dh, gradients.dw)
}

#[derive(Clone, Default)]
pub(super) struct RowLosses {
    pub(super) kl: f32,
    pub(super) boundary: f32,
    pub(super) nll_student: f32,
    pub(super) nll_teacher: f32,
    pub(super) agree: bool,
    pub(super) top1_student: u32,
}

impl RowLosses {
    /// Rows into columns.
    pub(super) fn into_distill(all: Vec<Self>, with_targets: bool, dh: Option<Tensor>, dw: Option<Tensor>) -> Distill {
        let targeted = if with_targets { all.as_slice() } else { &[] };
        Distill {
            kl: all.iter().map(|r| r.kl).collect(),
            boundary: all.iter().map(|r| r.boundary).collect(),
            nll_student: targeted.iter().map(|r| r.nll_student).collect(),
            nll_teacher: targeted.iter().map(|r| r.nll_teacher).collect(),
            agree: all.iter().map(|r| r.agree).collect(),
            top1_student: all.iter().map(|r| r.top1_student).collect(),
            dh,
            dw,
        }
    }
}

/// Losses of one row; with a weight, `z_s` becomes the gradient of the weighted loss.
fn row_losses(z_s: &mut [f32], z_t: &[f32], target: Option<usize>, terms: &DistillTerms, weight: Option<f32>) -> RowLosses {
    let (Some((best_s, max_s)), Some((best_t, max_t))) = (argmax(z_s), argmax(z_t)) else {
        // No number among the logits: the run has diverged, and the losses must say so.
        z_s.fill(f32::NAN);
        return RowLosses {
            kl: f32::NAN,
            boundary: f32::NAN,
            nll_student: f32::NAN,
            nll_teacher: f32::NAN,
            agree: false,
            top1_student: u32::MAX,
        };
    };
    let inv_temperature = 1.0 / terms.temperature;
    let (student, teacher) = (Softmax::of(z_s, max_s, inv_temperature), Softmax::of(z_t, max_t, inv_temperature));
    let plain_student = if terms.temperature == 1.0 { student } else { Softmax::of(z_s, max_s, 1.0) };
    let mut losses = RowLosses { agree: best_s == best_t, top1_student: best_s as u32, ..RowLosses::default() };
    if let Some(target) = target {
        losses.nll_student = -plain_student.log_probability(z_s[target]);
        let plain_teacher = if terms.temperature == 1.0 { teacher } else { Softmax::of(z_t, max_t, 1.0) };
        losses.nll_teacher = -plain_teacher.log_probability(z_t[target]);
    }
    let boundary = boundary_loss(z_s, z_t, best_s, best_t, terms);
    losses.boundary = boundary.as_ref().map_or(0.0, |b| b.loss);

    let squared = terms.temperature * terms.temperature;
    let Some(weight) = weight else {
        losses.kl = squared * kl(z_s, z_t, student, teacher);
        return losses;
    };
    // d (temperature^2 KL) / dz = temperature (p_S - p_T)
    let (kl_factor, ce_factor) = (weight * terms.kl * terms.temperature, weight * terms.ce);
    losses.kl = squared * kl_and_gradient(z_s, z_t, student, teacher, kl_factor, plain_student, ce_factor);
    if let Some(target) = target {
        z_s[target] -= ce_factor;
    }
    if let Some(b) = boundary {
        let slope = weight * terms.boundary * b.slope;
        z_s[b.chosen] += slope;
        z_s[b.other] -= slope;
    }
    losses
}

/// `p = exp((z - max) scale) / sum`.
#[derive(Clone, Copy)]
struct Softmax {
    max: f32,
    scale: f32,
    log_sum: f32,
}

impl Softmax {
    fn of(z: &[f32], max: f32, scale: f32) -> Self {
        let sum = if scale == 1.0 { sum_exp(z, max) } else { sum_exp_scaled(z, max, scale) };
        Self { max, scale, log_sum: sum.ln() }
    }

    #[inline(always)]
    fn log_probability(self, z: f32) -> f32 {
        (z - self.max) * self.scale - self.log_sum
    }
}

struct Boundary {
    loss: f32,
    /// Derivative of the loss by the student's margin.
    slope: f32,
    chosen: usize,
    other: usize,
}

/// `None` when the vocabulary has a single token.
fn boundary_loss(z_s: &[f32], z_t: &[f32], best_s: usize, best_t: usize, terms: &DistillTerms) -> Option<Boundary> {
    let chosen = best_t;
    let other = if best_s != chosen { best_s } else { best_except(z_s, chosen)? };
    let second_t = max(&z_t[..chosen]).max(max(&z_t[chosen + 1..]));
    let lead = z_t[chosen] - second_t;
    let omega = 1.0 / (1.0 + ((lead - terms.boundary_delta) / terms.boundary_width).exp());
    let wanted = (z_t[chosen] - z_t[other]).min(terms.margin_cap);
    let missing = (wanted - (z_s[chosen] - z_s[other])).max(0.0);
    Some(Boundary { loss: omega * missing * missing, slope: -2.0 * omega * missing, chosen, other })
}

fn best_except(z: &[f32], skip: usize) -> Option<usize> {
    let (before, after) = (argmax(&z[..skip]), argmax(&z[skip + 1..]).map(|(i, value)| (i + skip + 1, value)));
    match (before, after) {
        (Some(b), Some(a)) => Some(if a.1 > b.1 { a.0 } else { b.0 }),
        (one, other) => one.or(other).map(|(i, _)| i),
    }
}

vectorised! {
    fn sum_exp_scaled(z: &[f32], max: f32, scale: f32) -> f32 {
        let mut acc = [0.0; LANES];
        let (chunks, rest) = z.as_chunks::<LANES>();
        for z in chunks {
            for i in 0..LANES {
                acc[i] += exp((z[i] - max) * scale);
            }
        }
        for (a, z) in acc.iter_mut().zip(rest) {
            *a += exp((z - max) * scale);
        }
        add_lanes(acc)
    }
}

/// One token's share of the KL, `p_T (log p_T - log p_S) - p_T + p_S`, with both probabilities.
///
/// The last two terms sum to 0 over the vocabulary, but make every share non-negative and cancel the
/// rounding of the two normalisers to first order: a KL of 1e-4 nats keeps its digits in f32.
#[inline(always)]
fn kl_share(z_s: f32, z_t: f32, student: Softmax, teacher: Softmax) -> (f32, f32, f32) {
    let (log_s, log_t) = (student.log_probability(z_s), teacher.log_probability(z_t));
    let (p_s, p_t) = (exp(log_s), exp(log_t));
    // A token that the teacher rules out has log p_T = -inf and contributes p_S alone.
    let product = if p_t > 0.0 { p_t * (log_t - log_s) } else { 0.0 };
    (product - (p_t - p_s), p_s, p_t)
}

vectorised! {
    fn kl(z_s: &[f32], z_t: &[f32], student: Softmax, teacher: Softmax) -> f32 {
        let mut acc = [0.0; LANES];
        let ((s_chunks, s_rest), (t_chunks, t_rest)) = (z_s.as_chunks::<LANES>(), z_t.as_chunks::<LANES>());
        for (z_s, z_t) in s_chunks.iter().zip(t_chunks) {
            for i in 0..LANES {
                acc[i] += kl_share(z_s[i], z_t[i], student, teacher).0;
            }
        }
        for (a, (z_s, z_t)) in acc.iter_mut().zip(s_rest.iter().zip(t_rest)) {
            *a += kl_share(*z_s, *z_t, student, teacher).0;
        }
        add_lanes(acc)
    }
}

vectorised! {
    /// The KL; `z_s` becomes `kl_factor (p_S - p_T) + ce_factor softmax(z_S)`.
    fn kl_and_gradient(
        z_s: &mut [f32],
        z_t: &[f32],
        student: Softmax,
        teacher: Softmax,
        kl_factor: f32,
        plain_student: Softmax,
        ce_factor: f32,
    ) -> f32 {
        let mut acc = [0.0; LANES];
        let ((s_chunks, s_rest), (t_chunks, t_rest)) = (z_s.as_chunks_mut::<LANES>(), z_t.as_chunks::<LANES>());
        for (z_s, z_t) in s_chunks.iter_mut().zip(t_chunks) {
            for i in 0..LANES {
                let (share, p_s, p_t) = kl_share(z_s[i], z_t[i], student, teacher);
                acc[i] += share;
                z_s[i] = ce_factor.mul_add(exp(plain_student.log_probability(z_s[i])), kl_factor * (p_s - p_t));
            }
        }
        for (a, (z_s, &z_t)) in acc.iter_mut().zip(s_rest.iter_mut().zip(t_rest)) {
            let (share, p_s, p_t) = kl_share(*z_s, z_t, student, teacher);
            *a += share;
            *z_s = ce_factor.mul_add(exp(plain_student.log_probability(*z_s)), kl_factor * (p_s - p_t));
        }
        add_lanes(acc)
    }
}
