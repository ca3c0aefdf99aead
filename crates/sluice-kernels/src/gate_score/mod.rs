//! The gate: hidden state to score, one per KV head (or one per layer).
//!
//! `s_j = a . rmsnorm(x_j) + b + c pos_j / 1024` with a norm that has no weights:
//! `rmsnorm(x) = x / sqrt(mean(x^2) + eps)`. Always f32: bf16 scores tie so often that prefill and decode would
//! keep different keys. The sums of a row run in one fixed order on every CPU, whatever the other rows
//! are, so a token has the same score, bit for bit, in a prefill, in a decode step and on another machine.

pub(crate) mod cases;
mod cpu;
mod cuda;
pub mod naive;

#[cfg(test)]
mod tests;

use sluice_tensor::Tensor;

/// Positions per unit of the recency slope.
pub const RECENCY_UNIT: f32 = 1024.0;

/// Scores `[B, T, Gs]` of `x [B, T, M]` for `weight [Gs, M]`, `bias [Gs]`, `recency [Gs]`; `positions` has one
/// entry per row of a sequence.
#[track_caller]
pub fn fwd(x: &Tensor, weight: &Tensor, bias: &Tensor, recency: &Tensor, positions: &[u32], eps: f32) -> Tensor {
    let [b, t, gs] = check("gate_score::fwd", x, weight, positions);
    assert_eq!((bias.shape(), recency.shape()), (&[gs][..], &[gs][..]), "gate_score::fwd: bias and recency of {gs} heads");
    if let Some(gpu) = x.gpu() {
        return cuda::fwd(gpu, x, weight, bias, recency, positions, eps);
    }
    Tensor::from_vec(cpu::fwd(x.f32(), weight.f32(), bias.f32(), recency.f32(), positions, eps), [b, t, gs])
}

/// Scores `[B, T, G]` with `slopes[g] pos_j / 1024` added; row `j` of a sequence is at position `j`.
#[track_caller]
pub fn add_recency(scores: &Tensor, slopes: &[f32]) -> Tensor {
    let [_, t, g] = scores.dims();
    assert_eq!(slopes.len(), g, "add_recency to scores {:?}", scores.shape());
    if let Some(gpu) = scores.gpu() {
        return cuda::add_recency(gpu, scores, slopes);
    }
    let later = |(i, score): (usize, &f32)| score + slopes[i % g] * (i / g % t) as f32 / RECENCY_UNIT;
    Tensor::from_vec(scores.f32().iter().enumerate().map(later).collect(), scores.shape())
}

/// Scores `[Gs]` of one token `x [M]` at `position`, the bits of [`fwd`], into a slice that exists already.
#[track_caller]
pub fn token(x: &[f32], weight: &[f32], bias: &[f32], recency: &[f32], position: u32, eps: f32, scores: &mut [f32]) {
    let gs = scores.len();
    assert!(
        weight.len() == gs * x.len() && bias.len() == gs && recency.len() == gs,
        "gate_score of {} inputs for {gs} heads: {} weights, {} biases, {} slopes",
        x.len(),
        weight.len(),
        bias.len(),
        recency.len()
    );
    cpu::fwd_token(x, weight, bias, recency, position, eps, scores);
}

/// Gradients for `dscores [B, T, Gs]`: `(dweight [Gs, M], dbias [Gs], drecency [Gs], dx [B, T, M] if wanted)`.
#[track_caller]
pub fn bwd(
    dscores: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    positions: &[u32],
    eps: f32,
    want_dx: bool,
) -> (Tensor, Tensor, Tensor, Option<Tensor>) {
    let [b, t, gs] = check("gate_score::bwd", x, weight, positions);
    assert_eq!(dscores.shape(), [b, t, gs], "gate_score::bwd: dscores");
    if let Some(gpu) = x.gpu() {
        return cuda::bwd(gpu, dscores, x, weight, positions, eps, want_dx);
    }
    cpu::bwd(dscores, x, weight, positions, eps, want_dx)
}

#[track_caller]
fn check(op: &str, x: &Tensor, weight: &Tensor, positions: &[u32]) -> [usize; 3] {
    let [b, t, m] = x.dims();
    let [gs, m_weight] = weight.dims();
    assert_eq!(m, m_weight, "{op}: x {:?} with weight {:?}", x.shape(), weight.shape());
    assert_eq!(t, positions.len(), "{op}: x {:?} with {} positions", x.shape(), positions.len());
    [b, t, gs]
}
