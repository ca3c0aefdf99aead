//! The specification in f64.

use sluice_tensor::Tensor;

/// `[B, M]`.
pub fn fwd(x: &Tensor, lens: &[usize]) -> Vec<f64> {
    let [_, t, m] = x.dims();
    let mean = |b: usize, c: usize| {
        let sum: f64 = (0..lens[b]).map(|i| x.f32()[(b * t + i) * m + c] as f64).sum();
        if lens[b] == 0 { 0.0 } else { sum / lens[b] as f64 }
    };
    (0..lens.len()).flat_map(|b| (0..m).map(move |c| (b, c))).map(|(b, c)| mean(b, c)).collect()
}
