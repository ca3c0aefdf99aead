//! What can go wrong on a GPU, said so that the reader knows what to do.

use cudarc::driver::result::DriverError;

use super::memory::Held;

/// An error of the CUDA driver or one of its libraries.
///
/// Ops return tensors and not results: they raise this value as a panic payload ([`CudaError::raise`]), which the
/// binary turns into a message and a server may catch; the device stays usable after [`CudaError::OutOfMemory`].
#[derive(Clone, Debug, thiserror::Error)]
pub enum CudaError {
    /// There is no usable GPU, or a library is missing.
    #[error("{0}")]
    Missing(String),
    /// An allocation did not fit.
    #[error(
        "out of memory on {device}: asked for {}, while {} are held by tensors, {} by Sluice's cache of freed blocks and {} by the driver, \
         its libraries and other processes, of {} in all; lower the batch or the context, or recompute activations (checkpoint)",
        bytes(*.asked), bytes(.held.tensors), bytes(.held.cached), bytes(.held.others), bytes(.held.total)
    )]
    OutOfMemory {
        /// Name of the GPU.
        device: String,
        /// Bytes asked for.
        asked: usize,
        /// Who holds what.
        held: Held,
    },
    /// A kernel did not compile.
    #[error("NVRTC cannot compile {source_name} for {arch}:\n{log}")]
    Compile {
        /// Name of the source.
        source_name: String,
        /// Target.
        arch: String,
        /// The compiler's words.
        log: String,
    },
    /// Any other failure of a call.
    #[error("{call} failed: {reason}")]
    Call {
        /// What was attempted.
        call: String,
        /// What the driver or library says.
        reason: String,
    },
}

impl CudaError {
    pub(crate) fn call(call: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::Call { call: call.into(), reason: reason.to_string() }
    }

    /// Unwind with this error as the payload. Whoever catches it may print it; the panic hook does not.
    pub fn raise(self) -> ! {
        std::panic::resume_unwind(Box::new(self))
    }
}

/// The value, or the error raised ([`CudaError::raise`]).
pub fn or_raise<T>(result: Result<T, CudaError>) -> T {
    result.unwrap_or_else(|error| error.raise())
}

/// Name a driver call in its error.
pub(crate) trait Context<T> {
    fn during(self, call: &str) -> Result<T, CudaError>;
}

impl<T> Context<T> for Result<T, DriverError> {
    fn during(self, call: &str) -> Result<T, CudaError> {
        self.map_err(|error| {
            let said = error.error_string().map_or_else(|_| format!("{error:?}"), |s| s.to_string_lossy().into_owned());
            CudaError::call(call, said)
        })
    }
}

fn bytes(n: usize) -> String {
    match n {
        0..1024 => format!("{n} bytes"),
        1024..0x10_0000 => format!("{:.1} KiB", n as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", n as f64 / (1u64 << 20) as f64),
        _ => format!("{:.2} GiB", n as f64 / (1u64 << 30) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_memory_says_what_was_asked_for_who_holds_what_and_what_to_lower() {
        let held = Held { tensors: 3 << 30, cached: 5 << 20, others: 1 << 30, total: 80 << 30 };
        let said = CudaError::OutOfMemory { device: "NVIDIA H100".into(), asked: 100 << 30, held }.to_string();
        for part in ["NVIDIA H100", "asked for 100.00 GiB", "3.00 GiB are held by tensors", "5.0 MiB", "80.00 GiB", "lower the batch"] {
            assert!(said.contains(part), "{part} is missing in: {said}");
        }
    }

    #[test]
    fn a_raised_error_can_be_caught_by_its_type() {
        let caught = std::panic::catch_unwind(|| CudaError::Missing("no GPU".into()).raise()).expect_err("raised");
        assert_eq!(caught.downcast_ref::<CudaError>().expect("a CudaError").to_string(), "no GPU");
    }
}
