//! The few kernels that tensors themselves need: another format, a constant.

use std::sync::Arc;

use super::compile::KernelSource;
use super::error::{CudaError, or_raise};
use super::gpu::{Arg, Gpu};
use super::memory::Buffer;
use crate::tensor::{DType, Tensor};

const SOURCE: KernelSource = KernelSource { name: "elementwise", code: include_str!("elementwise.cu") };

const THREADS: u32 = 256;

/// Elements `offset..offset + n` of a tensor as another format, `[n]`.
pub(crate) fn convert(x: &Tensor, offset: usize, n: usize, dtype: DType) -> Tensor {
    assert!(offset + n <= x.len(), "elements {offset} to {} of {:?}", offset + n, x.shape());
    let gpu = Arc::clone(x.gpu().expect("conversion on the GPU"));
    let mut y = Tensor::empty_on(&gpu, [n], dtype);
    let name = match (x.dtype(), dtype) {
        (DType::F32, DType::Bf16) => "narrow",
        (DType::Bf16, DType::F32) => "widen",
        (from, to) => unreachable!("conversion of {from:?} to {to:?}"),
    };
    let from = x.address() + (offset * x.dtype().size()) as u64;
    run(&gpu, name, n, &[Arg::U64(from), Arg::U64(y.address_mut()), Arg::U64(n as u64)]);
    y
}

/// Set `n` elements of a tensor from `offset` on to 0.
pub(crate) fn clear_range(x: &mut Tensor, offset: usize, n: usize) {
    assert!(offset + n <= x.len(), "clearing {offset} to {} of {x:?}", offset + n);
    let gpu = Arc::clone(x.gpu().expect("clearing on the GPU"));
    let size = x.dtype().size();
    let to = x.address_mut() + (size * offset) as u64;
    // Both formats are a multiple of two bytes, and zero is zero in both.
    run(&gpu, "clear", n * size / 2, &[Arg::U64(to), Arg::U64((n * size / 2) as u64)]);
}

/// Whether two buffers of the same even length hold the same bytes. Waits for the GPU.
pub(super) fn same_bytes(gpu: &Arc<Gpu>, a: &Buffer, b: &Buffer) -> Result<bool, CudaError> {
    assert_eq!(a.bytes(), b.bytes(), "buffers that are compared");
    let differs = gpu.upload_slice(&[0u32])?;
    let n = a.bytes() / 2;
    run(gpu, "differ", n, &[a.into(), b.into(), (&differs).into(), Arg::U64(n as u64)]);
    Ok(gpu.download_slice::<u32>(&differs)? == [0])
}

fn run(gpu: &Gpu, name: &str, n: usize, args: &[Arg]) {
    let blocks = n.div_ceil(THREADS as usize * 8).min(1 << 20) as u32;
    // SAFETY: both addresses have room for `n` elements, as checked above, and the kernels stop there.
    or_raise(gpu.function(&SOURCE, name).and_then(|f| unsafe { gpu.launch(f, [blocks, 1, 1], [THREADS, 1, 1], 0, args) }));
}
