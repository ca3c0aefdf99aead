//! Counts the bytes that tensors hold, on all devices together, so that a claim about peak memory can be measured.
//! Counters are process-wide: a measurement is meaningful when one thing runs at a time.

use std::sync::atomic::{AtomicUsize, Ordering};

static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// Bytes held by live tensors and by kernel scratch that was announced with [`Scratch`].
pub fn current_bytes() -> usize {
    CURRENT.load(Ordering::Relaxed)
}

/// Largest [`current_bytes`] since the start or the last [`reset_peak`].
pub fn peak_bytes() -> usize {
    PEAK.load(Ordering::Relaxed)
}

/// Start a new measurement of the peak at the present level.
pub fn reset_peak() {
    PEAK.store(CURRENT.load(Ordering::Relaxed), Ordering::Relaxed);
}

pub(crate) fn allocated(bytes: usize) {
    let now = CURRENT.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

pub(crate) fn freed(bytes: usize) {
    CURRENT.fetch_sub(bytes, Ordering::Relaxed);
}

/// A scratch vector of a kernel that counts towards the peak while it lives.
pub struct Scratch {
    data: Vec<f32>,
}

impl Scratch {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        allocated(len * 4);
        Self { data: vec![0.0; len] }
    }
}

impl std::ops::Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.data
    }
}

impl std::ops::DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        freed(self.data.len() * 4);
    }
}
