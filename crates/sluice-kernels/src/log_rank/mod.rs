//! `-ln(rank / n)` of every label among those of its head: what a gate is fitted to. A router only compares scores, and every
//! halving of a budget weighs the same.

pub(crate) mod cases;
mod cuda;
pub mod naive;

use sluice_tensor::Tensor;

/// `-ln(rank / n)` of `y [n, G]` per column; rank 1 is the largest, ties in order of position.
#[track_caller]
pub fn minus_log_rank(y: &Tensor) -> Tensor {
    let [n, g] = y.dims();
    if let Some(gpu) = y.gpu() {
        return cuda::minus_log_rank(gpu, y);
    }
    let mut ranked = vec![0.0; n * g];
    for head in 0..g {
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| y.f32()[b * g + head].total_cmp(&y.f32()[a * g + head]));
        for (place, i) in order.into_iter().enumerate() {
            ranked[i * g + head] = (n as f32 / (place + 1) as f32).ln();
        }
    }
    Tensor::from_vec(ranked, [n, g])
}
