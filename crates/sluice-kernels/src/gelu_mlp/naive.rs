//! The specification in f64: the naive linear layers around the naive GELU, the hidden activations rounded to f32 once.

use sluice_tensor::Tensor;

use crate::{gelu, linear};

/// `gelu(x up^T + up_bias) down^T`; `round` is what a device does to a factor of a product.
pub fn fwd(x: &Tensor, up: &Tensor, up_bias: &Tensor, down: &Tensor, round: impl Fn(&Tensor) -> Tensor) -> Vec<f64> {
    let f = up.shape()[0];
    let f32s = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect::<Vec<_>>();
    let hidden = f32s(gelu::naive::fwd(&f32s(linear::naive::fwd(&round(x), &round(up), Some(up_bias)))));
    let n_rows = hidden.len().checked_div(f).unwrap_or(0);
    linear::naive::fwd(&round(&Tensor::from_vec(hidden, [n_rows, f])), &round(down), None)
}
