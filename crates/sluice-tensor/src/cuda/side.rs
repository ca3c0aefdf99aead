//! A second stream beside a GPU's compute stream, for kernels that leave room for others.

use cudarc::driver::{result, sys};

use super::error::Context as _;
use super::{Arg, CudaError, Function, Gpu};

/// The second stream of a GPU, and what orders it and the compute stream.
pub(super) struct SideStream {
    stream: sys::CUstream,
    forked: sys::CUevent,
    joined: sys::CUevent,
}

impl SideStream {
    pub(super) fn new() -> Result<Self, CudaError> {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).during("making a stream")?;
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).during("making an event");
        Ok(Self { stream, forked: event()?, joined: event()? })
    }

    /// # Safety
    /// Nothing may use the stream any more.
    pub(super) unsafe fn destroy(&mut self) {
        // SAFETY: made in `new`, released once by the caller's promise. There is nothing to do about a failure.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            for event in [self.forked, self.joined] {
                let _ = result::event::destroy(event);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}

/// Kernels beside the compute stream, from [`Gpu::fork`] to [`Side::join`].
#[must_use = "what comes later must wait for them: join"]
pub struct Side<'a> {
    gpu: &'a Gpu,
}

impl Gpu {
    /// Begin kernels that run beside those of the compute stream, after everything that it has been given so far.
    pub fn fork(&self) -> Result<Side<'_>, CudaError> {
        self.order(self.side.forked, self.stream, self.side.stream)?;
        Ok(Side { gpu: self })
    }

    /// Let `later` wait for what `earlier` has been given so far.
    fn order(&self, event: sys::CUevent, earlier: sys::CUstream, later: sys::CUstream) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: streams and events live as long as `self`. Another thread that records the event in between makes `later` wait for more.
        unsafe {
            result::event::record(event, earlier).during("recording an event")?;
            result::stream::wait_event(later, event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT).during("waiting for an event")
        }
    }
}

impl Side<'_> {
    /// Queue a kernel here.
    ///
    /// # Safety
    /// As for [`Gpu::launch`]. [`Side::join`] is called, and until then the compute stream is given nothing that reads what this kernel writes or writes
    /// what it touches, and none of that memory is freed.
    pub unsafe fn launch(&self, function: Function, grid: [u32; 3], block: [u32; 3], shared: u32, args: &[Arg]) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch_in(self.gpu.side.stream, function, grid, block, shared, args) }
    }

    /// What the compute stream is given from now on begins when the kernels here are done.
    pub fn join(self) -> Result<(), CudaError> {
        self.gpu.order(self.gpu.side.joined, self.gpu.side.stream, self.gpu.stream)
    }
}
