//! Elementwise sum of two tensors of one shape, f32 whatever the format of either; its gradient is the identity for both.

pub(crate) mod cases;
mod cuda;

use sluice_tensor::Tensor;

use crate::row_chunks::{CHUNK, for_each_chunk};
use crate::vector_math::{add_assign, vectorised};

/// `a + b`.
#[track_caller]
pub fn fwd(a: &Tensor, b: &Tensor) -> Tensor {
    assert_eq!(a.shape(), b.shape(), "add of {:?} and {:?}", a.shape(), b.shape());
    if let Some(gpu) = a.gpu() {
        return cuda::fwd(gpu, a, b);
    }
    let (av, bv) = (a.f32(), b.f32());
    let mut y = vec![0.0; av.len()];
    for_each_chunk(&mut y, CHUNK, |i, y| {
        let at = i * CHUNK;
        sum(&av[at..at + y.len()], &bv[at..at + y.len()], y);
    });
    Tensor::from_vec(y, a.shape())
}

/// `sum += x`, in the format of `sum`.
#[track_caller]
pub fn assign(sum: &mut Tensor, x: &Tensor) {
    assert_eq!(sum.shape(), x.shape(), "addition to {:?} of {:?}", sum.shape(), x.shape());
    if let Some(gpu) = x.gpu() {
        return cuda::assign(gpu, sum, x);
    }
    let xs = x.f32();
    for_each_chunk(sum.f32_mut(), CHUNK, |i, sum| add_assign(sum, &xs[i * CHUNK..i * CHUNK + sum.len()]));
}

/// `before + x`, in place if there is something before and nobody else looks at it.
#[track_caller]
pub fn onto(before: Option<Tensor>, x: Tensor) -> Tensor {
    match before {
        Some(mut sum) => {
            assign(&mut sum, &x);
            sum
        }
        None => x,
    }
}

vectorised! {
    fn sum(a: &[f32], b: &[f32], y: &mut [f32]) {
        for (y, (a, b)) in y.iter_mut().zip(a.iter().zip(b)) {
            *y = a + b;
        }
    }
}

#[cfg(test)]
mod tests {
    use sluice_testkit::Rng;

    use super::*;

    #[test]
    fn equals_the_plain_sum_for_every_size() {
        for n in [0, 1, 63, 100, 1000, CHUNK + 1, 3 * CHUNK] {
            let (a, b) = (Rng::new(1).normal_tensor([n]), Rng::new(2).normal_tensor([n]));
            let want: Vec<f32> = a.f32().iter().zip(b.f32()).map(|(a, b)| a + b).collect();
            assert_eq!(fwd(&a, &b).f32(), want, "{n} elements");
            let mut sum = a;
            assign(&mut sum, &b);
            assert_eq!(sum.f32(), want, "{n} elements in place");
        }
    }

    #[test]
    #[should_panic(expected = "add of [2, 3] and [3, 2]")]
    fn wrong_shape_is_refused() {
        fwd(&Tensor::zeros([2, 3]), &Tensor::zeros([3, 2]));
    }
}
