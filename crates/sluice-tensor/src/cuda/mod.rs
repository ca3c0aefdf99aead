//! NVIDIA GPUs: libraries found while running, memory, compiled kernels, matrix products.
//!
//! ```text
//! Libraries::find -> list -> Gpu::open -> Device::Cuda -> Tensor::to -> ops: Gpu::function, Gpu::launch, gemm
//! ```
//!
//! Nothing here is needed to build: without a driver [`Gpu::open`] says what is missing, and everything else works unchanged.

mod libraries;

mod gpu;
mod memory;

mod compile;

mod gemm;
mod tuning;

mod elementwise;
mod error;
mod side;
mod staging;

pub(crate) use elementwise::convert;

pub use compile::{Compiled, Compiler, KernelSource, PRELUDE};
pub use error::{CudaError, or_raise};
pub use gemm::{Epilogue, Mat, gemm};
pub use gpu::{Arg, Function, Gpu, GpuInfo, Options, Precision, list};
pub use libraries::{Libraries, Version};
pub use memory::{Buffer, Held};
pub use side::Side;
