//! The ops as methods of the tape: each runs a kernel now and says what its gradient is. Gradients of inputs that
//! want none (frozen weights) are not computed.

mod attention;
mod elementwise;
mod loss;
mod norm;
mod projection;

#[cfg(test)]
mod tests;

use sluice_tensor::Tensor;

/// `compute()` if the gradient is wanted.
fn wanted(wants: bool, compute: impl FnOnce() -> Tensor) -> Option<Tensor> {
    wants.then(compute)
}
