//! AdamW (Loshchilov and Hutter) with decoupled decay, step by step as `torch.optim.AdamW` does it,
//! and the two things a trainer does to gradients before.

pub(crate) mod cases;
mod cuda;
pub mod naive;
#[cfg(test)]
mod tests;

use rayon::prelude::*;
use sluice_tensor::Tensor;

use crate::row_chunks::{CHUNK, for_each_chunk};
use crate::vector_math::{self, vectorised};

/// Settings of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the mean gradient.
    pub beta1: f32,
    /// Decay of the mean squared gradient.
    pub beta2: f32,
    /// Added to the root of the mean squared gradient.
    pub eps: f32,
    /// The parameter shrinks by `lr * weight_decay` a step.
    pub weight_decay: f32,
    /// Number of this step, from 1.
    pub step: u64,
}

/// Update `param` and the running means `m` and `v` of the gradient, times `grad_scale []`, and its square. Clipping so costs no pass of its
/// own over all gradients, and on a GPU nobody reads the factor ([`global_norm`]). Where it is not finite nothing changes.
#[track_caller]
pub fn step(param: &mut Tensor, grad: &Tensor, m: &mut Tensor, v: &mut Tensor, grad_scale: &Tensor, adamw: AdamW) {
    assert!(
        param.shape() == grad.shape() && m.shape() == grad.shape() && v.shape() == grad.shape() && grad_scale.len() == 1,
        "adamw step of param {:?}, grad {:?}, m {:?}, v {:?}",
        param.shape(),
        grad.shape(),
        m.shape(),
        v.shape()
    );
    assert!(adamw.step > 0, "adamw counts its steps from 1");
    let factors = Factors::new(&adamw);
    if let Some(gpu) = grad.gpu() {
        return cuda::step(gpu, param, grad, m, v, grad_scale, factors);
    }
    let grad_scale = grad_scale.item();
    if !grad_scale.is_finite() {
        return;
    }
    let work = |p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]| update(p, g, m, v, grad_scale, factors);
    let (p, g, m, v) = (param.f32_mut(), grad.f32(), m.f32_mut(), v.f32_mut());
    if p.len() <= CHUNK {
        return work(p, g, m, v);
    }
    p.par_chunks_mut(CHUNK)
        .zip(g.par_chunks(CHUNK))
        .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
        .for_each(|((p, g), (m, v))| work(p, g, m, v));
}

/// Euclidean norm of all gradients together, `[]`, and the factor `[]` that brings it down to `clip`: 1 for a smaller one, NaN for one that
/// is not finite. Both are where the gradients are.
pub fn global_norm(grads: &[&Tensor], clip: f32) -> (Tensor, Tensor) {
    if let Some(gpu) = grads.first().and_then(|g| g.gpu()) {
        return cuda::global_norm(gpu, grads, clip);
    }
    let chunk_sums = |g: &&Tensor| -> Vec<f64> { g.f32().par_chunks(CHUNK).map(sum_of_squares).collect() };
    let norm = grads.iter().map(|g| chunk_sums(g).iter().sum::<f64>()).sum::<f64>().sqrt() as f32;
    let factor = match norm {
        _ if !norm.is_finite() => f32::NAN,
        _ if norm > clip => clip / norm,
        _ => 1.0,
    };
    (Tensor::scalar(norm), Tensor::scalar(factor))
}

/// `t *= f`.
pub fn scale_in_place(t: &mut Tensor, f: f32) {
    if let Some(gpu) = t.gpu() {
        return cuda::scale(&gpu.clone(), t, f);
    }
    for_each_chunk(t.f32_mut(), CHUNK, |_, chunk| vector_math::scale(chunk, f));
}

/// `t *= factor`, a tensor of one element on the device of `t` that the host does not read.
#[track_caller]
pub fn scale_in_place_by(t: &mut Tensor, factor: &Tensor) {
    assert_eq!(factor.len(), 1, "scaling of {:?} by {:?}", t.shape(), factor.shape());
    if let Some(gpu) = t.gpu() {
        return cuda::scale_by(&gpu.clone(), t, factor);
    }
    let factor = factor.item();
    if factor != 1.0 {
        scale_in_place(t, factor);
    }
}

/// `t = max(t, 0)`: what a step does to parameters that have no meaning below 0.
pub fn raise_to_zero(t: &mut Tensor) {
    if let Some(gpu) = t.gpu() {
        return cuda::raise_to_zero(&gpu.clone(), t);
    }
    t.f32_mut().iter_mut().for_each(|x| *x = x.max(0.0));
}

/// What every element of a step has in common, computed once in f64.
#[derive(Clone, Copy)]
struct Factors {
    keep: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    step_size: f32,
    inv_sqrt_correction2: f32,
    eps: f32,
}

impl Factors {
    fn new(a: &AdamW) -> Self {
        // f32 powers of 0.999 would be off by a per cent after 10^5 steps.
        let correction = |beta: f32| 1.0 - (beta as f64).powf(a.step as f64);
        Self {
            keep: (1.0 - a.lr as f64 * a.weight_decay as f64) as f32,
            beta2: a.beta2,
            one_minus_beta1: (1.0 - a.beta1 as f64) as f32,
            one_minus_beta2: (1.0 - a.beta2 as f64) as f32,
            step_size: (a.lr as f64 / correction(a.beta1)) as f32,
            inv_sqrt_correction2: (1.0 / correction(a.beta2).sqrt()) as f32,
            eps: a.eps,
        }
    }
}

vectorised! {
    fn update(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], grad_scale: f32, f: Factors) {
        let n = p.len();
        let (g, m, v) = (&g[..n], &mut m[..n], &mut v[..n]);
        for i in 0..n {
            let g = g[i] * grad_scale;
            m[i] = (g - m[i]).mul_add(f.one_minus_beta1, m[i]);
            v[i] = (f.one_minus_beta2 * g).mul_add(g, f.beta2 * v[i]);
            let denominator = v[i].sqrt().mul_add(f.inv_sqrt_correction2, f.eps);
            p[i] = p[i].mul_add(f.keep, -f.step_size * (m[i] / denominator));
        }
    }
}

vectorised! {
    /// In f64: squares of f32 gradients overflow and vanish early.
    fn sum_of_squares(xs: &[f32]) -> f64 {
        let mut acc = [0.0f64; 16];
        let (chunks, rest) = xs.as_chunks::<16>();
        for x in chunks {
            for i in 0..16 {
                acc[i] += x[i] as f64 * x[i] as f64;
            }
        }
        for (a, &x) in acc.iter_mut().zip(rest) {
            *a += x as f64 * x as f64;
        }
        acc.iter().sum()
    }
}
