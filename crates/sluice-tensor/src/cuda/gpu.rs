//! One GPU: its context, its compute stream and one beside it, and everything that belongs to them. A handle is an [`Arc`]; there is no
//! global state beside it. Work is queued and returns at once; the host waits only in [`Gpu::synchronize`] and when it reads results,
//! and every wait is counted.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use cudarc::driver::{result, sys};

use super::compile::{Compiler, KernelSource};
use super::error::{Context, CudaError};
use super::gemm::Blas;
use super::libraries::{Libraries, Version};
use super::memory::{Buffer, Held, Pool};
use super::side::SideStream;
use super::staging::Staging;
use crate::tensor::{DType, Tensor};

/// Number format of the factors of matrix products; sums, norms, gates, losses and master weights are f32 in every mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Factors rounded to bf16 (8 bits).
    Bf16,
    /// Factors rounded to TF32 (11 bits) by the matrix units.
    Tf32,
    /// f32 throughout.
    F32,
}

impl Precision {
    /// Format of activations: of what products give and take. The residual stream, scores, losses, norms' statistics, weights and their
    /// gradients are f32 whatever the precision.
    pub fn activations(self) -> DType {
        match self {
            Self::Bf16 => DType::Bf16,
            Self::Tf32 | Self::F32 => DType::F32,
        }
    }

    /// Name in commands and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Tf32 => "tf32",
            Self::F32 => "f32",
        }
    }
}

/// How to open a GPU.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of the GPU, from 0.
    pub ordinal: usize,
    /// Factors of matrix products.
    pub precision: Precision,
    /// Folder for compiled kernels; without one they are compiled in every process.
    pub kernel_cache: Option<PathBuf>,
    /// Time what cuBLASLt proposes for every large product when its shape first comes, and keep the fastest with the same bits.
    pub tune: bool,
    /// CUDA folders in which to look for libraries that are not on the library path.
    pub cuda_folders: Vec<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self { ordinal: 0, precision: Precision::F32, kernel_cache: None, tune: false, cuda_folders: Vec::new() }
    }
}

/// What a GPU is.
#[derive(Clone, Debug)]
pub struct GpuInfo {
    /// Number of the GPU, from 0.
    pub ordinal: usize,
    /// Marketing name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Bytes of device memory.
    pub memory: usize,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that one block can have, in bytes.
    pub shared_memory_per_block: u32,
}

/// Every GPU of this machine; the reason if there is none. Makes no context.
pub fn list(libraries: &Libraries) -> Result<Vec<GpuInfo>, CudaError> {
    libraries.driver.clone().map_err(CudaError::Missing)?;
    result::init().during("starting the CUDA driver")?;
    let n = result::device::get_count().during("counting GPUs")?;
    if n == 0 {
        return Err(CudaError::Missing("the driver is there, but it shows no GPU".into()));
    }
    (0..n).map(info).collect()
}

fn info(ordinal: i32) -> Result<GpuInfo, CudaError> {
    use sys::CUdevice_attribute as A;
    let device = result::device::get(ordinal).during("opening a GPU")?;
    // SAFETY: `device` came from the driver.
    let attribute = |a| unsafe { result::device::get_attribute(device, a) }.during("asking a GPU what it is").map(|x| x as u32);
    Ok(GpuInfo {
        ordinal: ordinal as usize,
        name: result::device::get_name(device).during("asking a GPU for its name")?,
        capability: (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device) }.during("asking a GPU for its memory")?,
        multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_memory_per_block: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}

/// A GPU that is ready to compute. Two handles are the same device when they are the same `Gpu`.
pub struct Gpu {
    info: GpuInfo,
    precision: Precision,
    tunes: bool,
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub(super) stream: sys::CUstream,
    pub(super) side: SideStream,
    pub(super) pool: Pool,
    compiler: Compiler,
    modules: Mutex<HashMap<&'static str, Module>>,
    pub(super) staging: Mutex<Staging>,
    pub(super) blas: Mutex<Blas>,
    waits: AtomicU64,
    poison: AtomicBool,
}

struct Module {
    handle: sys::CUmodule,
    functions: HashMap<String, Function>,
}

// SAFETY: the driver's handles may be used from any thread whose current context is this one ([`Gpu::bind`]); what changes
// after opening is behind a mutex or atomic.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// A kernel that is loaded on its GPU, for [`Gpu::launch`]. Not longer usable than the GPU's handle.
#[derive(Clone, Copy)]
pub struct Function {
    handle: sys::CUfunction,
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// A device address, or any 64-bit number.
    U64(u64),
    /// 32-bit number.
    U32(u32),
    /// Signed 32-bit number.
    I32(i32),
    /// f32.
    F32(f32),
}

impl From<u32> for Arg {
    fn from(x: u32) -> Self {
        Self::U32(x)
    }
}

impl From<u64> for Arg {
    fn from(x: u64) -> Self {
        Self::U64(x)
    }
}

impl From<i32> for Arg {
    fn from(x: i32) -> Self {
        Self::I32(x)
    }
}

impl From<f32> for Arg {
    fn from(x: f32) -> Self {
        Self::F32(x)
    }
}

/// The address of f32 elements that a kernel reads. A kernel for another format takes [`Tensor::address`].
impl From<&Tensor> for Arg {
    #[track_caller]
    fn from(tensor: &Tensor) -> Self {
        assert_eq!(tensor.dtype(), DType::F32, "a kernel for f32 was given a tensor of shape {:?}", tensor.shape());
        Self::U64(tensor.address())
    }
}

/// The address of f32 elements that a kernel writes; a shared tensor is copied first.
impl From<&mut Tensor> for Arg {
    #[track_caller]
    fn from(tensor: &mut Tensor) -> Self {
        assert_eq!(tensor.dtype(), DType::F32, "a kernel for f32 was given a tensor of shape {:?}", tensor.shape());
        Self::U64(tensor.address_mut())
    }
}

impl From<&Buffer> for Arg {
    fn from(buffer: &Buffer) -> Self {
        Self::U64(buffer.address())
    }
}

impl Gpu {
    /// Open a GPU: context, stream, memory pool, compiler and cuBLASLt. Says what is missing.
    pub fn open(options: &Options) -> Result<Arc<Self>, CudaError> {
        let libraries = Libraries::find(&options.cuda_folders);
        let gpus = list(&libraries)?;
        let n = gpus.len();
        let info = gpus
            .into_iter()
            .nth(options.ordinal)
            .ok_or_else(|| CudaError::Missing(format!("there is no GPU {}; this machine has {n}, from 0", options.ordinal)))?;
        let nvrtc: Version = libraries.nvrtc.map_err(CudaError::Missing)?;
        libraries.cublaslt.map_err(CudaError::Missing)?;
        let compiler = Compiler::new(info.capability, libraries.driver.ok(), nvrtc, options.kernel_cache.clone())?;
        let device = result::device::get(info.ordinal as i32).during("opening a GPU")?;
        // SAFETY: `device` came from the driver; the context is made current before anything is made in it.
        let context = unsafe {
            let context = result::primary_ctx::retain(device).during("making a context")?;
            result::ctx::set_current(context).during("entering the context")?;
            context
        };
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).during("making a stream")?;
        let (side, pool) = (SideStream::new()?, Pool::new(info.ordinal as i32)?);
        let (staging, blas) = (Mutex::new(Staging::new()?), Mutex::new(Blas::new()?));
        let (modules, waits, poison) = (Mutex::default(), AtomicU64::new(0), AtomicBool::new(false));
        let (precision, tunes) = (options.precision, options.tune);
        Ok(Arc::new(Self { info, precision, tunes, device, context, stream, side, pool, compiler, modules, staging, blas, waits, poison }))
    }

    /// What it is.
    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// Marketing name.
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// Factors of matrix products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Whether large products try several algorithms: see [`Options::tune`].
    pub(super) fn tunes(&self) -> bool {
        self.tunes
    }

    /// Architecture that kernels are compiled for.
    pub fn arch(&self) -> &str {
        self.compiler.arch()
    }

    /// Who holds this GPU's memory now.
    pub fn held(&self) -> Result<Held, CudaError> {
        self.bind()?;
        self.pool.held()
    }

    /// Bytes of live tensors and scratch on this GPU.
    pub fn current_bytes(&self) -> usize {
        self.pool.current()
    }

    /// Largest [`Self::current_bytes`] since the start or the last [`Self::reset_peak`].
    pub fn peak_bytes(&self) -> usize {
        self.pool.peak()
    }

    /// Start a new measurement of the peak at the present level.
    pub fn reset_peak(&self) {
        self.pool.reset_peak();
    }

    /// Wait until everything queued is done. Reports errors of kernels that ran since the last wait.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        self.waits.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.during("waiting for the GPU")
    }

    /// How often the host has waited for this GPU: for results, or for large uploads and small ones that came too fast. A training step adds
    /// none before its figures are read.
    pub fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    /// From now on fresh memory is NaN in every format, so that a kernel that leaves a part of its output unwritten is noticed.
    pub fn poison_fresh_memory(&self, poison: bool) {
        self.poison.store(poison, Ordering::Relaxed);
    }

    /// `bytes` without defined content.
    pub fn alloc(self: &Arc<Self>, bytes: usize) -> Result<Buffer, CudaError> {
        let buffer = Buffer::new(self, bytes)?;
        if self.poison.load(Ordering::Relaxed) {
            self.fill_bytes(&buffer, 0xff)?;
        }
        Ok(buffer)
    }

    /// A slice of plain numbers in fresh memory: token ids, positions, weights of rows.
    pub fn upload_slice<T: bytemuck::NoUninit>(self: &Arc<Self>, slice: &[T]) -> Result<Buffer, CudaError> {
        let buffer = Buffer::new(self, std::mem::size_of_val(slice))?;
        self.upload(bytemuck::cast_slice(slice), &buffer, 0)?;
        Ok(buffer)
    }

    /// The numbers of a buffer, once everything queued before is done.
    #[track_caller]
    pub fn download_slice<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(&self, from: &Buffer) -> Result<Vec<T>, CudaError> {
        let mut slice = vec![T::zeroed(); from.bytes() / size_of::<T>()];
        self.download(from, 0, bytemuck::cast_slice_mut(&mut slice))?;
        Ok(slice)
    }

    /// Queue a copy of host bytes to `at` bytes into a buffer. The host bytes may change when this returns.
    #[track_caller]
    pub fn upload(&self, bytes: &[u8], to: &Buffer, at: usize) -> Result<(), CudaError> {
        assert!(at + bytes.len() <= to.bytes(), "{} bytes do not fit at {at} of {}", bytes.len(), to.bytes());
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let has_waited = self.staging.lock().expect("no panic while staging").upload(bytes, to.address() + at as u64, self.stream)?;
        self.waits.fetch_add(has_waited.into(), Ordering::Relaxed);
        Ok(())
    }

    /// Bytes of a buffer, once everything queued before is done.
    #[track_caller]
    pub fn download(&self, from: &Buffer, at: usize, bytes: &mut [u8]) -> Result<(), CudaError> {
        assert!(at + bytes.len() <= from.bytes(), "{} bytes at {at} of {}", bytes.len(), from.bytes());
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the range was checked, and `bytes` is borrowed until the wait below has ended.
        unsafe { result::memcpy_dtoh_async(bytes, from.address() + at as u64, self.stream) }.during("copying from the GPU")?;
        self.synchronize()
    }

    /// Queue a copy inside the GPU's memory.
    #[track_caller]
    pub fn copy(&self, from: &Buffer, from_at: usize, to: &Buffer, to_at: usize, bytes: usize) -> Result<(), CudaError> {
        assert!(from_at + bytes <= from.bytes() && to_at + bytes <= to.bytes(), "copy of {bytes} bytes");
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both ranges were checked.
        unsafe { result::memcpy_dtod_async(to.address() + to_at as u64, from.address() + from_at as u64, bytes, self.stream) }
            .during("copying on the GPU")
    }

    /// Queue setting every byte of a buffer to `value`.
    pub fn fill_bytes(&self, buffer: &Buffer, value: u8) -> Result<(), CudaError> {
        if buffer.bytes() == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the whole of a live buffer.
        unsafe { result::memset_d8_async(buffer.address(), value, buffer.bytes(), self.stream) }.during("filling memory")
    }

    /// A kernel of a source, compiled and loaded the first time.
    pub fn function(&self, source: &KernelSource, name: &str) -> Result<Function, CudaError> {
        let mut modules = self.modules.lock().expect("no panic while loading");
        let module = match modules.entry(source.name) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let mut image = self.compiler.compile(source)?.image;
                image.push(0); // PTX is a C string
                self.bind()?;
                // SAFETY: a complete image, as the driver wants it.
                let handle = unsafe { result::module::load_data(image.as_ptr().cast()) }.during(&format!("loading {}", source.name))?;
                entry.insert(Module { handle, functions: HashMap::new() })
            }
        };
        if let Some(function) = module.functions.get(name) {
            return Ok(*function);
        }
        let c_name = CString::new(name).expect("a name has no zero byte");
        // SAFETY: the module is loaded.
        let handle =
            unsafe { result::module::get_function(module.handle, c_name) }.during(&format!("finding {name} in {}", source.name))?;
        let function = Function { handle };
        module.functions.insert(name.to_string(), function);
        Ok(function)
    }

    /// Let a kernel have more than 48 KiB of dynamic shared memory.
    pub fn allow_shared_memory(&self, function: Function, bytes: u32) -> Result<(), CudaError> {
        self.bind()?;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is loaded.
        unsafe { result::function::set_function_attribute(function.handle, attribute, bytes as i32) }.during("asking for shared memory")
    }

    /// Queue a kernel. A grid without blocks launches nothing.
    ///
    /// # Safety
    /// `args` are what the kernel declares, in order, and it stays within the memory that they name.
    pub unsafe fn launch(&self, function: Function, grid: [u32; 3], block: [u32; 3], shared: u32, args: &[Arg]) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_in(self.stream, function, grid, block, shared, args) }
    }

    /// Queue a kernel in one of this GPU's streams.
    ///
    /// # Safety
    /// As for [`Self::launch`].
    pub(super) unsafe fn launch_in(
        &self,
        stream: sys::CUstream,
        function: Function,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        if grid.contains(&0) {
            return Ok(());
        }
        self.bind()?;
        let mut pointers: Vec<*mut std::ffi::c_void> = args
            .iter()
            .map(|arg| match arg {
                Arg::U64(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Arg::U32(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Arg::I32(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Arg::F32(x) => std::ptr::from_ref(x).cast_mut().cast(),
            })
            .collect();
        let ([gx, gy, gz], [bx, by, bz]) = (grid, block);
        // SAFETY: the caller's promise; the driver copies the arguments before it returns.
        unsafe { result::launch_kernel(function.handle, (gx, gy, gz), (bx, by, bz), shared, stream, &mut pointers) }
            .during("launching a kernel")
    }

    /// Make this GPU's context current on the calling thread.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained until `self` is dropped.
        unsafe { result::ctx::set_current(self.context) }.during("entering the context")
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // SAFETY: every buffer holds an `Arc` of `self`, so none is left; everything below was made here and is released once.
        // There is nothing to do about a failure.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            self.side.destroy();
            for module in self.modules.get_mut().into_iter().flat_map(|m| m.drain()) {
                let _ = result::module::unload(module.1.handle);
            }
            if let Ok(staging) = self.staging.get_mut() {
                staging.destroy();
            }
            if let Ok(blas) = self.blas.get_mut() {
                blas.destroy();
            }
            self.pool.destroy();
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{} ({})", self.info.ordinal, self.info.name)
    }
}
