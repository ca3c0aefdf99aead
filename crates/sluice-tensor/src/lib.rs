//! Contiguous tensors on a device, with memory accounting, and the matrix product.
//! Knows nothing about models or tapes.

pub mod cuda;
pub mod gemm;
pub mod gemm_bf16;
pub mod memory;
mod tensor;

pub use tensor::{DType, Device, Tensor};
