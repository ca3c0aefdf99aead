//! Mean of the valid rows of each sequence: `y_b = sum over t < lens[b] of x_bt / lens[b]`, `x [B, T, M]`, `y [B, M]` in f32; zeros for an empty
//! sequence. For inference: forward only. Padding rows are never read.

pub(crate) mod cases;
mod cuda;
pub mod naive;

use sluice_tensor::Tensor;

use crate::row_chunks::for_each_chunk;
use crate::vector_math::{add_assign, scale};

/// `[B, M]`.
#[track_caller]
pub fn fwd(x: &Tensor, lens: &[usize]) -> Tensor {
    let [b, t, m] = x.dims();
    assert!(lens.len() == b && lens.iter().all(|&n| n <= t), "mean_pool of x {:?} with lengths {lens:?}", x.shape());
    if let Some(gpu) = x.gpu() {
        return cuda::fwd(gpu, x, lens);
    }
    let mut y = vec![0.0; b * m];
    let xs = x.f32();
    for_each_chunk(&mut y, m.max(1), |i, y| {
        for row in xs[i * t * m..][..lens[i] * m].chunks_exact(m) {
            add_assign(y, row);
        }
        scale(y, 1.0 / lens[i].max(1) as f32);
    });
    Tensor::from_vec(y, [b, m])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "mean_pool of x [1, 2, 3] with lengths [3]")]
    fn a_length_beyond_the_rows_is_refused() {
        fwd(&Tensor::zeros([1, 2, 3]), &[3]);
    }
}
