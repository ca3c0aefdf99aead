//! The definition in f64.

use sluice_tensor::Tensor;

/// See [`super::fwd`].
pub fn fwd(x: &Tensor, lens: &[usize]) -> Vec<f64> {
    let [b, t, g] = x.dims();
    let at = |b: usize, t_: usize, g_: usize| x.f32()[(b * t + t_) * g + g_] as f64;
    let mut y = vec![0.0; x.len()];
    for i in 0..b * t * g {
        let (sequence, row, column) = (i / (t * g), i / g % t, i % g);
        let len = lens[sequence];
        if row < len {
            y[i] = at(sequence, row, column) - (0..len).map(|r| at(sequence, r, column)).sum::<f64>() / len as f64;
        }
    }
    y
}
