//! A task per row; the rows are added in f64.

use rayon::prelude::*;
use sluice_tensor::Tensor;

use super::TINY;

pub(super) fn fwd(a: &Tensor, b: &Tensor, weights: &[f32]) -> (Tensor, Tensor) {
    let m = a.last_dim().max(1);
    let row_sums: Vec<(f32, f32)> = (a.f32().par_chunks(m), b.f32().par_chunks(m))
        .into_par_iter()
        .map(|(a, b)| a.iter().zip(b).fold((0.0, 0.0), |(error, norm), (a, b)| (error + (a - b) * (a - b), norm + b * b)))
        .collect();
    let counted = || weights.iter().zip(&row_sums).filter(|(weight, _)| **weight != 0.0);
    let loss: f64 = counted().map(|(&weight, &(error, norm))| weight as f64 * (error as f64 / norm.max(TINY) as f64)).sum();
    let factor = |(&weight, &(_, norm)): (&f32, &(f32, f32))| if weight == 0.0 { 0.0 } else { 2.0 * weight / norm.max(TINY) };
    let factors: Vec<f32> = weights.iter().zip(&row_sums).map(factor).collect();
    (Tensor::scalar(loss as f32), Tensor::from_vec(factors, [weights.len()]))
}

pub(super) fn bwd(dy: &Tensor, a: &Tensor, b: &Tensor, factors: &Tensor) -> Tensor {
    let (dy, m) = (dy.item(), a.last_dim().max(1));
    let mut da = vec![0.0; a.len()];
    da.par_chunks_mut(m).zip(factors.f32()).enumerate().filter(|(_, (_, factor))| **factor != 0.0).for_each(|(i, (da, factor))| {
        let (a, b) = (&a.f32()[i * m..(i + 1) * m], &b.f32()[i * m..(i + 1) * m]);
        for ((da, a), b) in da.iter_mut().zip(a).zip(b) {
            *da = dy * factor * (a - b);
        }
    });
    Tensor::from_vec(da, a.shape())
}
