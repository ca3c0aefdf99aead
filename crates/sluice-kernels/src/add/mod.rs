//! Elementwise sum of two tensors of one shape; its gradient is the identity for both.

use sluice_tensor::Tensor;

use crate::row_chunks::{CHUNK, for_each_chunk};
use crate::vector_math::vectorised;

/// `a + b`.
#[track_caller]
pub fn fwd(a: &Tensor, b: &Tensor) -> Tensor {
    assert_eq!(a.shape(), b.shape(), "add of {:?} and {:?}", a.shape(), b.shape());
    let (av, bv) = (a.f32(), b.f32());
    let mut y = vec![0.0; av.len()];
    for_each_chunk(&mut y, CHUNK, |i, y| {
        let at = i * CHUNK;
        sum(&av[at..at + y.len()], &bv[at..at + y.len()], y);
    });
    Tensor::from_vec(y, a.shape())
}

vectorised! {
    fn sum(a: &[f32], b: &[f32], y: &mut [f32]) {
        for (y, (a, b)) in y.iter_mut().zip(a.iter().zip(b)) {
            *y = a + b;
        }
    }
}
