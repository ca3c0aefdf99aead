//! A score per token for every KV head, where the gate has one for all: `[.., 1] -> [.., G]`.

pub(crate) mod cases;
mod cuda;

use sluice_tensor::Tensor;

/// `x [.., 1]` repeated, `[.., n]`.
#[track_caller]
pub fn fwd(x: &Tensor, n: usize) -> Tensor {
    let shape = with_last(x, 1, n);
    match x.gpu() {
        Some(gpu) => cuda::fwd(gpu, x, shape),
        None => Tensor::from_vec(x.f32().iter().flat_map(|&x| std::iter::repeat_n(x, n)).collect(), shape),
    }
}

/// `dx [.., 1]` of `dy [.., n]`: the sum over the copies, in order.
#[track_caller]
pub fn bwd(dy: &Tensor) -> Tensor {
    let n = dy.last_dim();
    let shape = with_last(dy, n, 1);
    match dy.gpu() {
        Some(gpu) => cuda::bwd(gpu, dy, shape),
        None => Tensor::from_vec(dy.f32().chunks_exact(n.max(1)).map(|heads| heads.iter().sum()).collect(), shape),
    }
}

#[track_caller]
fn with_last(x: &Tensor, from: usize, to: usize) -> Vec<usize> {
    match x.shape() {
        [rest @ .., last] if *last == from && to > 0 => rest.iter().copied().chain([to]).collect(),
        shape => panic!("repeat_heads of {shape:?} from {from} to {to}"),
    }
}
