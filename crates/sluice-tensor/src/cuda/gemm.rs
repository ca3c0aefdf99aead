//! The matrix product on the GPU: cuBLASLt, row-major, results f32 or bf16. Factors are what the GPU's [`Precision`] says; sums are f32.
//!
//! cuBLASLt thinks in columns: a row-major `c = a b` is its `c^T = b^T a^T` on the same memory, so `b` is its first factor.
//! The choice of algorithm is asked for once per shape and kept. It depends on nothing but the shape, or is one of those with the same
//! bits ([`super::tuning`]), so a product has the same bits every time.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};
use cudarc::driver;

use super::error::{Context, CudaError, or_raise};
use super::gpu::{Gpu, Precision};
use super::tuning;
use crate::tensor::{DType, Tensor};

/// NVIDIA's advice for Hopper; a split sum over a long inner dimension needs some of it.
const WORKSPACE: usize = 32 << 20;

/// A row-major matrix in a tensor on a GPU, or its transpose.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    tensor: &'a Tensor,
    /// Elements before the first.
    offset: usize,
    rows: usize,
    cols: usize,
    row_stride: usize,
    transposed: bool,
}

impl<'a> Mat<'a> {
    /// The whole of a tensor as `[rows, cols]`.
    #[track_caller]
    pub fn new(tensor: &'a Tensor, rows: usize, cols: usize) -> Self {
        assert_eq!(tensor.len(), rows * cols, "a tensor of shape {:?} as a matrix [{rows}, {cols}]", tensor.shape());
        Self::within(tensor, 0, rows, cols, cols)
    }

    /// `[rows, cols]` from element `offset` on, rows `row_stride` elements apart.
    #[track_caller]
    pub fn within(tensor: &'a Tensor, offset: usize, rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(row_stride >= cols, "rows of {cols} elements overlap at stride {row_stride}");
        let end = if rows == 0 || cols == 0 { 0 } else { offset + (rows - 1) * row_stride + cols };
        assert!(end <= tensor.len(), "[{rows}, {cols}] from {offset} with row stride {row_stride} in a tensor of {:?}", tensor.shape());
        Self { tensor, offset, rows, cols, row_stride, transposed: false }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    fn shape(&self) -> (usize, usize) {
        if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) }
    }

    /// Elements from the first to the last.
    fn span(&self) -> usize {
        (self.rows - 1) * self.row_stride + self.cols
    }

    /// The factor in `dtype`, converted if need be; the tensor that holds it, and the offset in elements.
    fn in_format(&self, dtype: DType) -> (Tensor, usize) {
        if self.tensor.dtype() == dtype {
            return (self.tensor.clone(), self.offset);
        }
        let converted = super::elementwise::convert(self.tensor, self.offset, self.span(), dtype);
        (converted, 0)
    }
}

/// What happens to a product before it is stored.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// Add to what is there instead of overwriting it.
    pub accumulate: bool,
    /// `[n]` in the format of the result, added to every row. A narrow result may be rounded before and after.
    pub bias: Option<&'a Tensor>,
}

/// `c = a b + bias`, into the `[m, n]` of `c` (f32 or bf16) from element `offset` on, rows `row_stride` elements apart.
/// `a` and `b` are f32 or bf16. A dimension of 0 inside gives zeros and the bias is not added.
#[track_caller]
pub fn gemm(a: Mat<'_>, b: Mat<'_>, c: &mut Tensor, offset: usize, row_stride: usize, epilogue: Epilogue<'_>) {
    let ((m, k), (k_b, n)) = (a.shape(), b.shape());
    assert_eq!(k, k_b, "product of [{m}, {k}] and [{k_b}, {n}]");
    let gpu = Arc::clone(c.gpu().expect("the result of a product on the GPU lies there"));
    if m == 0 || n == 0 {
        return;
    }
    assert!(row_stride >= n && offset + (m - 1) * row_stride + n <= c.len(), "[{m}, {n}] from {offset} by {row_stride} in {:?}", c.shape());
    if let Some(bias) = epilogue.bias {
        assert_eq!((bias.shape(), bias.dtype()), (&[n][..], c.dtype()), "bias of a product with {n} columns");
    }
    if k == 0 {
        assert!(row_stride == n, "an empty product is written to contiguous memory");
        if !epilogue.accumulate {
            super::elementwise::clear_range(c, offset, m * n);
        }
        return;
    }
    let both_narrow = a.tensor.dtype() == DType::Bf16 && b.tensor.dtype() == DType::Bf16;
    let format = if both_narrow || gpu.precision() == Precision::Bf16 { DType::Bf16 } else { DType::F32 };
    let ((a_tensor, a_offset), (b_tensor, b_offset)) = (a.in_format(format), b.in_format(format));
    let c_address = c.address_mut() + (c.dtype().size() * offset) as u64;
    let addresses =
        [b_tensor.address() + (b_offset * format.size()) as u64, a_tensor.address() + (a_offset * format.size()) as u64, c_address];
    let key = Key {
        m,
        k,
        n,
        strides: [b.row_stride, a.row_stride, row_stride],
        transposed: [b.transposed, a.transposed],
        format,
        result: c.dtype(),
        precision: gpu.precision(),
        with_bias: epilogue.bias.is_some(),
        alignment: addresses.map(|address| 1 << address.trailing_zeros().min(8)),
    };
    let bias = epilogue.bias.map(Tensor::address);
    let mut blas = gpu.blas.lock().expect("no panic inside a product");
    or_raise(gpu.bind().and_then(|()| blas.run(&gpu, &key, addresses, bias, epilogue.accumulate)));
}

/// Everything that the choice of an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) m: usize,
    pub(super) k: usize,
    pub(super) n: usize,
    /// Of cuBLASLt's first factor, second factor and result.
    pub(super) strides: [usize; 3],
    transposed: [bool; 2],
    format: DType,
    pub(super) result: DType,
    precision: Precision,
    with_bias: bool,
    alignment: [u32; 3],
}

/// cuBLASLt, its workspace and the algorithms chosen so far.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    plans: HashMap<Key, Plan>,
    /// One for all products: they run one after the other in the one stream.
    workspace: driver::sys::CUdeviceptr,
}

/// Descriptors and algorithm of one shape.
pub(super) struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// How many algorithms are tried where products are tuned: all that cuBLASLt has been seen to propose for one shape.
const PROPOSALS: usize = 8;

impl Blas {
    /// The context must be current, and the library be there.
    pub(super) fn new() -> Result<Self, CudaError> {
        let handle = result::create_handle().map_err(|e| CudaError::call("starting cuBLASLt", e))?;
        // SAFETY: plain allocation, released in `destroy`. It is the library's, so tensors do not count it.
        let workspace = unsafe { driver::result::malloc_sync(WORKSPACE) }.during("allocating cuBLASLt's workspace")?;
        Ok(Self { handle, plans: HashMap::new(), workspace })
    }

    fn run(&mut self, gpu: &Arc<Gpu>, key: &Key, addresses: [u64; 3], bias: Option<u64>, accumulate: bool) -> Result<(), CudaError> {
        if !self.plans.contains_key(key) {
            let n = if tuning::is_worth(gpu, key) { PROPOSALS } else { 1 };
            let (mut plan, proposals) = Plan::choose(self.handle, key, n).map_err(|e| failed(key, e))?;
            if proposals.len() > 1 {
                plan.algorithm = tuning::fastest(gpu, key, &proposals, |algorithm, result| {
                    let tried = Plan { algorithm: *algorithm, ..plan };
                    self.queue(gpu, key, &tried, [addresses[0], addresses[1], result], bias, false)
                })?;
            }
            self.plans.insert(*key, plan);
        }
        self.queue(gpu, key, &self.plans[key], addresses, bias, accumulate)
    }

    fn queue(&self, gpu: &Gpu, key: &Key, plan: &Plan, addresses: [u64; 3], bias: Option<u64>, accumulate: bool) -> Result<(), CudaError> {
        let failed = |e| failed(key, e);
        let [first, second, result] = addresses;
        let (one, beta) = (1.0f32, if accumulate { 1.0f32 } else { 0.0 });
        // SAFETY: the descriptors were made for these shapes, `gemm` checked that they lie within their tensors (a result that is tried has a buffer of
        // that size), and the stream runs in order.
        unsafe {
            if let Some(bias) = bias {
                let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
                result::set_matmul_desc_attribute(plan.product, attribute, (&raw const bias).cast(), 8).map_err(failed)?;
            }
            result::matmul(
                self.handle,
                plan.product,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                first as *const _,
                plan.layouts[0],
                second as *const _,
                plan.layouts[1],
                result as *const _,
                plan.layouts[2],
                result as *mut _,
                plan.layouts[2],
                &plan.algorithm,
                self.workspace as *mut _,
                WORKSPACE,
                gpu.stream.cast(),
            )
            .map_err(failed)
        }
    }

    /// # Safety
    /// The context is current, and no product is in flight or will be asked for.
    pub(super) unsafe fn destroy(&mut self) {
        // SAFETY: made here, released once. There is nothing to do about a failure.
        unsafe {
            for (_, plan) in self.plans.drain() {
                plan.destroy();
            }
            let _ = result::destroy_handle(self.handle);
            let _ = driver::result::free_sync(self.workspace);
        }
    }
}

fn failed(key: &Key, e: result::CublasError) -> CudaError {
    CudaError::call(format!("the product of [{}, {}] and [{}, {}]", key.m, key.k, key.k, key.n), e)
}

impl Plan {
    /// With the first of up to `n` algorithms that cuBLASLt proposes, and all of them.
    fn choose(handle: sys::cublasLtHandle_t, key: &Key, n: usize) -> Result<(Self, Vec<sys::cublasLtMatmulAlgo_t>), result::CublasError> {
        use sys::cublasComputeType_t as Compute;
        use sys::cublasLtMatmulDescAttributes_t as Desc;
        use sys::cublasLtMatmulPreferenceAttributes_t as Pref;
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let compute = match (key.format, key.precision) {
            (DType::F32, Precision::Tf32) => Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => Compute::CUBLAS_COMPUTE_32F,
        };
        let [format, of_result] = [key.format, key.result].map(|dtype| if dtype == DType::Bf16 { CUDA_R_16BF } else { CUDA_R_32F });
        // As cuBLASLt sees it: the first factor is b^T [n, k], the second a^T [k, m]; row-major memory is its column-major transpose.
        let stored = |rows: usize, cols: usize, transposed: bool| if transposed { (cols, rows) } else { (rows, cols) };
        let (first, second) = (stored(key.n, key.k, key.transposed[0]), stored(key.k, key.m, key.transposed[1]));
        let layout =
            |format, (rows, cols): (usize, usize), stride| result::create_matrix_layout(format, rows as u64, cols as u64, stride as i64);
        // SAFETY: attributes have the sizes that cuBLASLt documents (i32 for operations and the epilogue, u64 and u32 for preferences).
        unsafe {
            let product = result::create_matmul_desc(compute, CUDA_R_32F)?;
            for (attribute, transposed) in
                [Desc::CUBLASLT_MATMUL_DESC_TRANSA, Desc::CUBLASLT_MATMUL_DESC_TRANSB].into_iter().zip(key.transposed)
            {
                let operation = i32::from(transposed);
                result::set_matmul_desc_attribute(product, attribute, (&raw const operation).cast(), 4)?;
            }
            if key.with_bias {
                let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
                result::set_matmul_desc_attribute(product, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, (&raw const epilogue).cast(), 4)?;
            }
            let layouts = [
                layout(format, first, key.strides[0])?,
                layout(format, second, key.strides[1])?,
                layout(of_result, (key.n, key.m), key.strides[2])?,
            ];
            let preference = result::create_matmul_pref()?;
            let workspace = WORKSPACE as u64;
            result::set_matmul_pref_attribute(
                preference,
                Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                8,
            )?;
            // Sums of parts are added in f32, not in the format of the result, and not by whoever comes first.
            let reduction = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            result::set_matmul_pref_attribute(
                preference,
                Pref::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                (&raw const reduction).cast(),
                4,
            )?;
            let [a, b, c] = key.alignment;
            for (attribute, alignment) in [
                (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, a),
                (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, b),
                (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
                (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c),
            ] {
                result::set_matmul_pref_attribute(preference, attribute, (&raw const alignment).cast(), 4)?;
            }
            let [l0, l1, l2] = layouts;
            let proposals = propose(n, |most, found, n_found| {
                sys::cublasLtMatmulAlgoGetHeuristic(handle, product, l0, l1, l2, l2, preference, most, found, n_found)
            });
            result::destroy_matmul_pref(preference)?;
            let proposals = proposals?;
            Ok((Self { product, layouts, algorithm: proposals[0] }, proposals))
        }
    }

    unsafe fn destroy(self) {
        // SAFETY: made in `choose`, released here alone.
        unsafe {
            let _ = result::destroy_matmul_desc(self.product);
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

/// Up to `n` algorithms, the best guess first, at least one.
fn propose(
    n: usize,
    ask: impl FnOnce(i32, *mut sys::cublasLtMatmulHeuristicResult_t, *mut i32) -> sys::cublasStatus_t,
) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, result::CublasError> {
    // SAFETY: all zero is a valid value of this plain struct.
    let mut found = vec![unsafe { std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>() }; n];
    let mut n_found = 0;
    ask(n as i32, found.as_mut_ptr(), &raw mut n_found).result()?;
    found.truncate(n_found as usize);
    found.retain(|one| one.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
    if found.is_empty() {
        return Err(result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
    }
    Ok(found.into_iter().map(|one| one.algo).collect())
}
