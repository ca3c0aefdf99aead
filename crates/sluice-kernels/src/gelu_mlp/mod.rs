//! The MLP of an encoder without its last bias, which the norm behind it adds: `y = gelu(x up^T + up_bias) down^T`, `x [.., M]`, `up [F, M]`,
//! `up_bias [F]`, `down [M, F]`, `y [.., M]`. For inference: forward only.
//!
//! On a GPU rows go through in chunks whose hidden activations stay in the L2 cache between the three steps.

pub(crate) mod cases;
mod cuda;
pub mod naive;

use sluice_tensor::Tensor;

use crate::{gelu, linear};

/// Bytes of hidden activations of a chunk: what stays in an L2 cache of 40 MB or more beside the weights that pass through.
const CHUNK: usize = 32 << 20;

/// `y [.., M]`; on a GPU in the format that its precision gives to activations.
#[track_caller]
pub fn fwd(x: &Tensor, up: &Tensor, up_bias: &Tensor, down: &Tensor) -> Tensor {
    fwd_in_chunks(x, up, up_bias, down, CHUNK)
}

#[track_caller]
fn fwd_in_chunks(x: &Tensor, up: &Tensor, up_bias: &Tensor, down: &Tensor, chunk: usize) -> Tensor {
    let ([f, m], [m_down, f_down]) = (up.dims(), down.dims());
    assert!(
        x.last_dim() == m && m_down == m && f_down == f && up_bias.shape() == [f],
        "gelu_mlp of x {:?} with up {:?}, its bias {:?} and down {:?}",
        x.shape(),
        up.shape(),
        up_bias.shape(),
        down.shape()
    );
    match x.gpu() {
        Some(gpu) => cuda::fwd(gpu, x, up, up_bias, down, chunk),
        None => linear::fwd(&gelu::fwd_biased(linear::fwd(x, up, None), up_bias), down, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "gelu_mlp of x [2, 3]")]
    fn wrong_shapes_are_refused() {
        fwd(&Tensor::zeros([2, 3]), &Tensor::zeros([5, 3]), &Tensor::zeros([5]), &Tensor::zeros([5, 3]));
    }
}
