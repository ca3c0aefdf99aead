//! How ops queue kernels on a GPU: a grid over elements or rows, and column sums, which several gradients are.

use std::sync::Arc;

use sluice_tensor::cuda::{Arg, Gpu, KernelSource, or_raise};
use sluice_tensor::{DType, Tensor};

/// Threads of a block in every grid here.
pub(crate) const THREADS: u32 = 256;

/// Rows of a block when a warp takes one.
pub(crate) const ROWS: u32 = THREADS / 32;

const SOURCE: KernelSource = KernelSource { name: "column_sums", code: include_str!("column_sums.cu") };

/// Queue a kernel with blocks of [`THREADS`].
///
/// # Safety
/// As for [`Gpu::launch`]: `args` are what the kernel declares, and it stays within the memory that they name.
pub(crate) unsafe fn run(gpu: &Gpu, source: &KernelSource, name: &str, grid: [u32; 3], args: &[Arg]) {
    // SAFETY: the caller's promise.
    or_raise(gpu.function(source, name).and_then(|f| unsafe { gpu.launch(f, grid, [THREADS, 1, 1], 0, args) }));
}

/// Queue a kernel with blocks of any size and `shared` bytes of dynamic shared memory. Panics when a block of this GPU has less.
///
/// # Safety
/// As for [`run`].
#[track_caller]
pub(crate) unsafe fn launch(gpu: &Gpu, source: &KernelSource, name: &str, grid: [usize; 3], threads: u32, shared: u32, args: &[Arg]) {
    let most = gpu.info().shared_memory_per_block;
    assert!(shared <= most, "{name} wants {shared} bytes of shared memory, a block of {gpu:?} has {most}");
    let function = or_raise(gpu.function(source, name));
    // 48 KiB need no leave, but a kernel's static shared memory counts among them.
    if shared > 32 << 10 {
        or_raise(gpu.allow_shared_memory(function, shared));
    }
    // SAFETY: the caller's promise.
    or_raise(unsafe { gpu.launch(function, grid.map(|x| x as u32), [threads, 1, 1], shared, args) });
}

/// A grid whose threads stride over `n` elements.
pub(crate) fn over_elements(n: usize) -> [u32; 3] {
    [n.div_ceil(THREADS as usize).min(1 << 16) as u32, 1, 1]
}

/// A grid with a warp for every row.
pub(crate) fn over_rows(n_rows: usize) -> [u32; 3] {
    [n_rows.div_ceil(ROWS as usize) as u32, 1, 1]
}

/// An uninitialised f32 output on the GPU.
pub(crate) fn output(gpu: &Arc<Gpu>, shape: impl Into<Vec<usize>>) -> Tensor {
    Tensor::empty_on(gpu, shape, DType::F32)
}

/// Address of something that may be absent, 0 if it is.
pub(crate) fn optional(tensor: Option<&Tensor>) -> Arg {
    Arg::U64(tensor.map_or(0, Tensor::address))
}

/// The sum of all elements, `[]`: added in f64 by one block, in one order.
pub(crate) fn sum_to_scalar(x: &Tensor) -> Tensor {
    let gpu = x.gpu().expect("on the GPU");
    let mut sum = output(gpu, []);
    // SAFETY: `x` has so many elements, `sum` one.
    unsafe { run(gpu, &SOURCE, "sum_to_scalar", [1, 1, 1], &[x.into(), (&mut sum).into(), (x.len() as u64).into()]) };
    sum
}

/// The sum of `parts` tensors of `shape` that lie one after the other, added in order.
pub(crate) fn sum_of_parts(partial: &Tensor, parts: usize, shape: impl Into<Vec<usize>>) -> Tensor {
    let gpu = partial.gpu().expect("on the GPU");
    let mut out = output(gpu, shape);
    let n = out.len();
    assert_eq!(partial.len(), parts * n, "{parts} parts of {n} elements in {:?}", partial.shape());
    let args = [partial.into(), (&mut out).into(), (parts as u32).into(), (n as u64).into()];
    // SAFETY: sizes were checked.
    unsafe { run(gpu, &SOURCE, "sum_partials", over_elements(n), &args) };
    out
}

/// `out[g, c] = sum over rows r of coefficients[r, g] row_scale[r] x[r, c] y[r, c]`, `[n_out, m]`, every factor but `x` optional.
/// Rows are added in one order, whatever else runs.
pub(crate) struct ColumnSums<'a> {
    pub(crate) x: &'a Tensor,
    pub(crate) y: Option<&'a Tensor>,
    pub(crate) row_scale: Option<&'a Tensor>,
    /// `[rows, n_out]`.
    pub(crate) coefficients: Option<&'a Tensor>,
    pub(crate) n_out: usize,
}

impl ColumnSums<'_> {
    pub(crate) fn run(&self, n_rows: usize, m: usize) -> Tensor {
        const ROWS_PER_CHUNK: usize = 64;
        let gpu = Arc::clone(self.x.gpu().expect("on the GPU"));
        let n_chunks = n_rows.div_ceil(ROWS_PER_CHUNK).clamp(1, 512);
        let per_chunk = n_rows.div_ceil(n_chunks);
        let mut partial = output(&gpu, [n_chunks, self.n_out, m]);
        let grid = [m.div_ceil(32) as u32, n_chunks as u32, self.n_out as u32];
        // SAFETY: inputs have `n_rows` rows of `m` (or 1, or `n_out`) elements, `partial` was made for the grid.
        unsafe {
            let args = [
                self.x.into(),
                optional(self.y),
                optional(self.row_scale),
                optional(self.coefficients),
                (&mut partial).into(),
                (n_rows as u32).into(),
                (per_chunk as u32).into(),
                (m as u32).into(),
            ];
            run(&gpu, &SOURCE, "partial_sums", grid, &args);
        }
        sum_of_parts(&partial, n_chunks, [self.n_out, m])
    }
}
