//! Device memory: the driver's stream-ordered pool, told to keep what is freed, with our count on top.
//!
//! A block that is dropped goes back to the pool in the order of the compute stream and serves the next allocation without
//! the driver; no call waits for the GPU. When nothing is left, the pool is emptied once before giving up.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::{result, sys};

use super::error::{Context, CudaError};
use super::gpu::Gpu;
use crate::memory;

/// Who holds the memory of a GPU, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Live tensors and scratch of this process on this GPU.
    pub tensors: usize,
    /// Freed blocks that the pool keeps for the next allocation, and its rounding.
    pub cached: usize,
    /// The driver, its libraries, other processes.
    pub others: usize,
    /// All of it.
    pub total: usize,
}

/// A pool of one device and the bytes that are out.
pub(super) struct Pool {
    handle: sys::CUmemoryPool,
    current: AtomicUsize,
    peak: AtomicUsize,
}

impl Pool {
    /// The context of device `ordinal` must be current.
    pub(super) fn new(ordinal: i32) -> Result<Self, CudaError> {
        // SAFETY: all zero is a valid value of this plain struct; the fields that matter are set below.
        let mut properties: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
        properties.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        set_location_id(&mut properties.location, ordinal);
        let mut keep_everything = u64::MAX;
        // SAFETY: `properties` is a valid description, the pool is fresh, and the attribute is one u64.
        let handle = unsafe {
            let handle = result::mem_pool::create(&properties).during("creating a memory pool")?;
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(handle, attribute, (&raw mut keep_everything).cast()).during("setting up the memory pool")?;
            handle
        };
        Ok(Self { handle, current: AtomicUsize::new(0), peak: AtomicUsize::new(0) })
    }

    pub(super) fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    pub(super) fn peak(&self) -> usize {
        self.peak.load(Ordering::Relaxed)
    }

    pub(super) fn reset_peak(&self) {
        self.peak.store(self.current(), Ordering::Relaxed);
    }

    /// The context must be current.
    pub(super) fn held(&self) -> Result<Held, CudaError> {
        let (free, total) = result::mem_get_info().during("asking for free memory")?;
        let mut reserved = 0u64;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT;
        // SAFETY: the pool is alive, and the attribute is one u64.
        unsafe { result::mem_pool::get_attribute(self.handle, attribute, (&raw mut reserved).cast()) }.during("asking the memory pool")?;
        let (tensors, reserved) = (self.current(), reserved as usize);
        Ok(Held { tensors, cached: reserved.saturating_sub(tensors), others: (total - free).saturating_sub(reserved), total })
    }

    fn allocated(&self, bytes: usize) {
        let now = self.current.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(now, Ordering::Relaxed);
        memory::allocated(bytes);
    }

    fn freed(&self, bytes: usize) {
        self.current.fetch_sub(bytes, Ordering::Relaxed);
        memory::freed(bytes);
    }

    /// Give the device its memory back; nothing of the pool may be used afterwards.
    pub(super) fn destroy(&self) {
        // SAFETY: called once, by the owner's drop, when no block is left. There is nothing to do about a failure.
        let _ = unsafe { result::mem_pool::destroy(self.handle) };
    }
}

fn set_location_id(location: &mut sys::CUmemLocation, ordinal: i32) {
    location.id = ordinal;
}

/// A block of device memory, freed in the order of the compute stream.
pub struct Buffer {
    gpu: Arc<Gpu>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl Buffer {
    /// `bytes` without defined content. No bytes take no memory.
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, CudaError> {
        if bytes == 0 {
            return Ok(Self { gpu: Arc::clone(gpu), address: 0, bytes });
        }
        gpu.bind()?;
        let pool = &gpu.pool;
        // SAFETY: pool and stream live as long as `gpu`.
        let allocate = || unsafe { result::mem_pool::alloc_async(pool.handle, bytes, gpu.stream) };
        let address = allocate().or_else(|error| {
            if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return Err(CudaError::call(format!("allocating {bytes} bytes"), format!("{error:?}")));
            }
            // Blocks freed in the stream become memory again once the GPU has passed that point.
            gpu.synchronize()?;
            // SAFETY: the pool is alive.
            unsafe { result::mem_pool::trim_to(pool.handle, 0) }.during("emptying the memory pool")?;
            allocate().or_else(|_| Err(CudaError::OutOfMemory { device: gpu.name().into(), asked: bytes, held: pool.held()? }))
        })?;
        pool.allocated(bytes);
        Ok(Self { gpu: Arc::clone(gpu), address, bytes })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Address on the device, for kernel arguments; 0 without bytes.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Whose memory it is.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        // SAFETY: allocated from this stream's pool in `new` and freed here alone; kernels that still use it were
        // queued in this stream before, or joined to it (`side.rs`). There is nothing to do about a failure.
        let _ = self.gpu.bind().map(|()| unsafe { result::free_async(self.address, self.gpu.stream) });
        self.gpu.pool.freed(self.bytes);
    }
}
