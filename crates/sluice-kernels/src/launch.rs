//! How ops queue kernels on a GPU: a grid over elements or rows, and column sums, which several gradients are.

use std::sync::Arc;

use sluice_tensor::cuda::{Arg, Gpu, KernelSource, or_raise};
use sluice_tensor::{DType, Tensor};

/// Threads of a block in every grid here.
pub(crate) const THREADS: u32 = 256;

/// Rows of a block when a warp takes one.
pub(crate) const ROWS: u32 = THREADS / 32;

/// A source for either format of activations, which it calls `act`: see [`of_format`].
macro_rules! formats {
    ($name:literal, $file:literal) => {
        [
            sluice_tensor::cuda::KernelSource { name: $name, code: concat!("typedef float act;\n", include_str!($file)) },
            sluice_tensor::cuda::KernelSource { name: concat!($name, "_bf16"), code: concat!("typedef u16 act;\n", include_str!($file)) },
        ]
    };
}
pub(crate) use formats;

/// The source for activations in a format.
pub(crate) fn of_format(sources: &'static [KernelSource; 2], dtype: DType) -> &'static KernelSource {
    match dtype {
        DType::F32 => &sources[0],
        DType::Bf16 => &sources[1],
    }
}

static SOURCES: [KernelSource; 2] = formats!("column_sums", "column_sums.cu");

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
    if shared > 24 << 10 {
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

/// An uninitialised activation on the GPU, in the format that its precision gives them.
pub(crate) fn activation(gpu: &Arc<Gpu>, shape: impl Into<Vec<usize>>) -> Tensor {
    Tensor::empty_on(gpu, shape, gpu.precision().activations())
}

/// A weight as a factor of a product: converted once until it is written, where the precision rounds factors.
pub(crate) fn factor(gpu: &Gpu, weight: &Tensor) -> Tensor {
    match gpu.precision().activations() {
        DType::Bf16 => weight.rounded(),
        DType::F32 => weight.clone(),
    }
}

/// Address of an activation that a kernel of its format reads.
pub(crate) fn act(tensor: &Tensor) -> Arg {
    Arg::U64(tensor.address())
}

/// The same for one that it writes.
pub(crate) fn act_mut(tensor: &mut Tensor) -> Arg {
    Arg::U64(tensor.address_mut())
}

/// Address of something that may be absent, 0 if it is.
pub(crate) fn optional(tensor: Option<&Tensor>) -> Arg {
    tensor.map_or(Arg::U64(0), Arg::from)
}

/// The sum of all elements, `[]`: added in f64 by one block, in one order.
pub(crate) fn sum_to_scalar(x: &Tensor) -> Tensor {
    let gpu = x.gpu().expect("on the GPU");
    let mut sum = output(gpu, []);
    // SAFETY: `x` has so many elements, `sum` one.
    unsafe { run(gpu, &SOURCES[0], "sum_to_scalar", [1, 1, 1], &[x.into(), (&mut sum).into(), (x.len() as u64).into()]) };
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
    unsafe { run(gpu, &SOURCES[0], "sum_partials", [n.div_ceil(32) as u32, 1, 1], &args) };
    out
}

/// `out[g, c] = sum over rows r of coefficients[r, g] row_scale[r] x[r, c] y[r, c]`, `[n_out, m]`, every factor but `x` optional.
/// `x` and `y` have one format, all else is f32. Rows are added in one order, whatever else runs.
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
        assert!(self.y.is_none_or(|y| y.dtype() == self.x.dtype()), "column sums of {:?} and {:?}", self.x, self.y);
        let n_chunks = n_rows.div_ceil(ROWS_PER_CHUNK).clamp(1, 512);
        let per_chunk = n_rows.div_ceil(n_chunks);
        let mut partial = output(&gpu, [n_chunks, self.n_out, m]);
        let grid = [m.div_ceil(32) as u32, n_chunks as u32, self.n_out as u32];
        // SAFETY: inputs have `n_rows` rows of `m` (or 1, or `n_out`) elements, `partial` was made for the grid.
        unsafe {
            let args = [
                act(self.x),
                self.y.map_or(Arg::U64(0), act),
                optional(self.row_scale),
                optional(self.coefficients),
                (&mut partial).into(),
                (n_rows as u32).into(),
                (per_chunk as u32).into(),
                (m as u32).into(),
            ];
            run(&gpu, of_format(&SOURCES, self.x.dtype()), "partial_sums", grid, &args);
        }
        sum_of_parts(&partial, n_chunks, [self.n_out, m])
    }
}
