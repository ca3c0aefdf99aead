//! SwiGLU: `silu(gate) * up` with `silu(x) = x sigmoid(x)`, elementwise on tensors of one shape.

pub(crate) mod cases;
mod cuda;
pub mod naive;
#[cfg(test)]
mod tests;

use sluice_tensor::Tensor;

use crate::row_chunks::{CHUNK, for_each_chunk, for_each_chunk_pair};
use crate::vector_math::{sigmoid, vectorised};

/// `silu(gate) * up`.
#[track_caller]
pub fn fwd(gate: &Tensor, up: &Tensor) -> Tensor {
    assert_eq!(gate.shape(), up.shape(), "swiglu of gate {:?} and up {:?}", gate.shape(), up.shape());
    if let Some(gpu) = gate.gpu() {
        return cuda::fwd(gpu, gate, up);
    }
    let (g, u) = (gate.f32(), up.f32());
    let mut y = vec![0.0; g.len()];
    for_each_chunk(&mut y, CHUNK, |i, y| {
        let range = i * CHUNK..i * CHUNK + y.len();
        fwd_slice(&g[range.clone()], &u[range], y);
    });
    Tensor::from_vec(y, gate.shape())
}

/// [`fwd`] into a slice that exists already.
#[track_caller]
pub fn slice(gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == y.len(), "swiglu of {}, {} and {} numbers", gate.len(), up.len(), y.len());
    fwd_slice(gate, up, y);
}

/// Gradients of both inputs: `(dgate, dup)`.
#[track_caller]
pub fn bwd(dy: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
    assert!(
        gate.shape() == up.shape() && dy.shape() == gate.shape(),
        "backward of swiglu with dy {:?}, gate {:?}, up {:?}",
        dy.shape(),
        gate.shape(),
        up.shape()
    );
    if let Some(gpu) = gate.gpu() {
        return cuda::bwd(gpu, dy, gate, up);
    }
    let (d, g, u) = (dy.f32(), gate.f32(), up.f32());
    let (mut dgate, mut dup) = (vec![0.0; g.len()], vec![0.0; g.len()]);
    for_each_chunk_pair((&mut dgate, CHUNK), (&mut dup, CHUNK), |i, dgate, dup| {
        let range = i * CHUNK..i * CHUNK + dgate.len();
        bwd_slice(&d[range.clone()], &g[range.clone()], &u[range], dgate, dup);
    });
    (Tensor::from_vec(dgate, gate.shape()), Tensor::from_vec(dup, gate.shape()))
}

vectorised! {
    fn fwd_slice(gate: &[f32], up: &[f32], y: &mut [f32]) {
        for (y, (g, u)) in y.iter_mut().zip(gate.iter().zip(up)) {
            *y = g * sigmoid(*g) * u;
        }
    }
}

vectorised! {
    fn bwd_slice(dy: &[f32], gate: &[f32], up: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let n = dy.len();
        let (gate, up, dgate, dup) = (&gate[..n], &up[..n], &mut dgate[..n], &mut dup[..n]);
        for i in 0..n {
            let s = sigmoid(gate[i]);
            let silu = gate[i] * s;
            dup[i] = dy[i] * silu;
            // silu' = s + g s (1 - s)
            dgate[i] = dy[i] * up[i] * (1.0 - s).mul_add(silu, s);
        }
    }
}
