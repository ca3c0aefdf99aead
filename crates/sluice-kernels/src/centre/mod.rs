//! Columns of every sequence minus their mean over the sequence: `y_tj = x_tj - mean_t x_tj` over the first `lens[b]` rows of `[B, T, G]`, and
//! 0 in the others. Its own backward.

pub(crate) mod cases;
mod cuda;
pub mod naive;

use sluice_tensor::Tensor;

/// `x [B, T, G]` without the mean of every sequence and column; 0 after a sequence's end.
#[track_caller]
pub fn fwd(x: &Tensor, lens: &[usize]) -> Tensor {
    let [b, t, g] = x.dims();
    assert!(lens.len() == b && lens.iter().all(|&len| len <= t), "centre of x {:?} with lengths {lens:?}", x.shape());
    if let Some(gpu) = x.gpu() {
        return cuda::fwd(gpu, x, lens);
    }
    let mut y = x.clone();
    for (sequence, &len) in y.f32_mut().chunks_exact_mut((t * g).max(1)).zip(lens) {
        let (sequence, padding) = sequence.split_at_mut(len * g);
        for column in 0..g {
            let mean = sequence.iter().skip(column).step_by(g).map(|&x| x as f64).sum::<f64>() / len as f64;
            sequence.iter_mut().skip(column).step_by(g).for_each(|x| *x -= mean as f32);
        }
        padding.fill(0.0);
    }
    y
}
