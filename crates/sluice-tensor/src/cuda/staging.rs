//! Pinned memory through which small uploads go, so that the host need not wait: token ids, positions, targets. Large ones (weights)
//! take the driver's path for pageable memory, which copies before it returns.
//!
//! Two halves take turns; before a half is written again, the copies out of it must be done, which they have been for long
//! unless uploads outrun the GPU.

use cudarc::driver::{result, sys};

use super::error::{Context, CudaError};

/// Bytes of one half; larger uploads do not go through here. A training step uploads less than this (positions, mostly, op by op), so that the
/// copies out of the other half are done when it is entered.
const HALF: usize = 16 << 20;

/// Starts of pieces are multiples of this, so that any element type can be copied fast.
const ALIGN: usize = 256;

pub(super) struct Staging {
    memory: *mut u8,
    /// Recorded after the last copy out of each half.
    done: [sys::CUevent; 2],
    half: usize,
    used: usize,
}

impl Staging {
    /// The context must be current.
    pub(super) fn new() -> Result<Self, CudaError> {
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).during("making an event");
        let done = [event()?, event()?];
        // SAFETY: plain allocation, released in `destroy`.
        let memory = unsafe { result::malloc_host(2 * HALF, 0) }.during("allocating pinned memory")?;
        Ok(Self { memory: memory.cast(), done, half: 0, used: 0 })
    }

    /// Queue a copy of `bytes` to a device address whose range the caller has checked. Returns whether the host had to wait for the GPU.
    pub(super) fn upload(&mut self, bytes: &[u8], to: u64, stream: sys::CUstream) -> Result<bool, CudaError> {
        if bytes.len() > HALF {
            // SAFETY: the range was checked; from pageable memory the call returns when the bytes have been read.
            unsafe { result::memcpy_htod_async(to, bytes, stream) }.during("copying to the GPU")?;
            return Ok(true);
        }
        let mut has_waited = false;
        // SAFETY: the piece lies within its half, which no copy reads any more: `done` was waited for when the half was entered.
        unsafe {
            if self.used + bytes.len() > HALF {
                result::event::record(self.done[self.half], stream).during("recording an event")?;
                self.half ^= 1;
                self.used = 0;
                has_waited = result::event::query(self.done[self.half]).is_err();
                result::event::synchronize(self.done[self.half]).during("waiting for a copy")?;
            }
            let piece = std::slice::from_raw_parts_mut(self.memory.add(self.half * HALF + self.used), bytes.len());
            piece.copy_from_slice(bytes);
            self.used = (self.used + bytes.len()).next_multiple_of(ALIGN);
            result::memcpy_htod_async(to, piece, stream).during("copying to the GPU")?;
            Ok(has_waited)
        }
    }

    /// # Safety
    /// The context is current, no copy is in flight, and nothing is uploaded afterwards.
    pub(super) unsafe fn destroy(&mut self) {
        // SAFETY: made in `new`, released here alone.
        unsafe {
            let _ = result::free_host(self.memory.cast());
            for event in self.done {
                let _ = result::event::destroy(event);
            }
        }
    }
}
