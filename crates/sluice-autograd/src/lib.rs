//! A small tape that strings the fused ops together: record, then walk backwards once. With recomputing
//! checkpoint segments, and backward from a given gradient, which pipeline stages need.
//! Knows nothing about models, losses' weights or optimizers.
//!
//! ```
//! use sluice_autograd::Tape;
//! use sluice_tensor::Tensor;
//!
//! let tape = Tape::recording();
//! let x = tape.leaf(Tensor::from_vec(vec![3.0], [1]));
//! let y = tape.add(&tape.scale(&x, 2.0), &x);
//! let gradients = tape.backward(&[(y, Tensor::full(1.0, [1]))]);
//! assert_eq!(gradients.of(&x).unwrap().f32(), [3.0]);
//! ```

mod tape;

mod backward;
mod checkpoint;
mod ops;

#[cfg(test)]
mod tests;

pub use backward::Gradients;
pub use tape::{Param, Tape, Var};
