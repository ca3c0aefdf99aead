//! From attention mass to the label of a gate: what evicting a key would cost.
//!
//! `y_j = 1/2 ln max(m_j, 1e-24)`, `m_j = sum over readers t and heads h of (a_tj |W_O,h v_j| / |h_t|)^2`: what a key writes to the residual
//! stream, beside what is there (KVzip+, arXiv 2601.07891). The sum is [`future_mass`](crate::attention_mass::future_mass) with power 2
//! and the two weights of this module. All in f32, in every precision.

pub(crate) mod cases;
mod cpu;
mod cuda;
pub mod naive;

use sluice_tensor::{DType, Tensor};

/// `|W_O,h v_j|^2` `[B, S, H]` of `w_o [M, H D]` and `v [B, S, G, D]`, each f32 or bf16.
///
/// Through the Gram matrix of each head's slice of `W_O`, which costs `D^2` instead of `M D` per value.
#[track_caller]
pub fn key_weight(w_o: &Tensor, v: &Tensor) -> Tensor {
    let ([_, inputs], [b, s, g, d]) = (w_o.dims(), v.dims());
    let n_heads = inputs / d.max(1);
    let fits = g > 0 && d > 0 && inputs == n_heads * d && n_heads.is_multiple_of(g);
    assert!(fits, "key_weight of w_o {:?} and v {:?}", w_o.shape(), v.shape());
    if v.is_empty() {
        return v.reshape([b, s, n_heads]);
    }
    let [w_o, v] = [w_o, v].map(|x| x.to_dtype(DType::F32));
    match v.gpu() {
        Some(gpu) => cuda::key_weight(gpu, &w_o, &v, n_heads),
        None => cpu::key_weight(&w_o, &v, n_heads),
    }
}

/// `1 / max(|h_t|^2, 1e-12)` `[B, T]` of `h [B, T, M]`.
#[track_caller]
pub fn query_weight(h: &Tensor) -> Tensor {
    let [b, t, _] = h.dims();
    let h = h.to_dtype(DType::F32);
    match h.gpu() {
        Some(gpu) => cuda::query_weight(gpu, &h),
        None => Tensor::from_vec(cpu::query_weight(h.f32(), h.last_dim()), [b, t]),
    }
}

/// `1/2 ln max(m, 1e-24)` of every element.
pub fn label(mass: &Tensor) -> Tensor {
    match mass.gpu() {
        Some(gpu) => cuda::label(gpu, mass),
        None => Tensor::from_vec(mass.f32().iter().map(|m| 0.5 * m.max(1e-24).ln()).collect(), mass.shape()),
    }
}
