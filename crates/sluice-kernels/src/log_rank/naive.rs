//! The specification: count those before.

use sluice_tensor::Tensor;

/// `[n, G]`.
pub fn minus_log_rank(y: &Tensor) -> Vec<f64> {
    let [n, g] = y.dims();
    let of = |i: usize, head: usize| y.f32()[i * g + head];
    let rank = |i: usize, head: usize| 1 + (0..n).filter(|&j| of(j, head) > of(i, head) || (of(j, head) == of(i, head) && j < i)).count();
    (0..n * g).map(|at| (n as f64 / rank(at / g, at % g) as f64).ln()).collect()
}
