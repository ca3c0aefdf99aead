//! Dense attention on the CPU.

use sluice_tensor::Tensor;

use crate::attention_rows;
use crate::routed_attention::Dims;

pub(super) fn fwd(dims: &Dims, q: &Tensor, k: &Tensor, v: &Tensor, start: usize, lens: &[usize]) -> (Tensor, Tensor) {
    attention_rows::fwd(dims, q, k, v, lens, |_, t, _, seen| seen.extend((0..=start + t).map(|j| (j as u32, 0.0, 0.0))))
}

pub(super) fn bwd(
    dims: &Dims,
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    start: usize,
    lens: &[usize],
) -> (Tensor, Tensor, Tensor) {
    let (dq, dk, dv, _) = attention_rows::bwd(dims, [dout, q, k, v, o, lse], lens, |_, t, _, seen| {
        seen.extend((0..=start + t).map(|j| (j as u32, 0.0, 0.0)))
    });
    (dq, dk, dv)
}
