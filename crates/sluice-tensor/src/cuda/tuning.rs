//! Which of cuBLASLt's proposals for a product is the fastest: tried once for every large shape on a GPU that was opened with
//! [`Options::tune`](super::Options::tune). The host waits meanwhile, so it pays where the same sizes come many times.
//!
//! Only proposals whose result has the bits of the first one's take part. What a product is does not depend on a clock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::cublaslt::sys::cublasLtMatmulAlgo_t as Algorithm;

use super::elementwise;
use super::error::CudaError;
use super::gemm::Key;
use super::gpu::Gpu;

/// Operations below which a product is not worth trying: about ten microseconds on tensor cores.
const LEAST: usize = 1 << 32;

/// How often a proposal runs between two looks at the clock, and how many turns each has.
const RUNS: usize = 16;
const TURNS: usize = 3;

pub(super) fn is_worth(gpu: &Gpu, key: &Key) -> bool {
    gpu.tunes() && 2 * key.m * key.n * key.k >= LEAST && key.strides[2] == key.n
}

/// `queue(algorithm, address)` queues the product with its result, `[m, n]`, at an address. The first proposal where memory for two results is missing.
pub(super) fn fastest(
    gpu: &Arc<Gpu>,
    key: &Key,
    proposals: &[Algorithm],
    queue: impl Fn(&Algorithm, u64) -> Result<(), CudaError>,
) -> Result<Algorithm, CudaError> {
    let bytes = key.m * key.n * key.result.size();
    let (wanted, found) = match (gpu.alloc(bytes), gpu.alloc(bytes)) {
        (Ok(wanted), Ok(found)) => (wanted, found),
        (Err(CudaError::OutOfMemory { .. }), _) | (_, Err(CudaError::OutOfMemory { .. })) => return Ok(proposals[0]),
        (Err(e), _) | (_, Err(e)) => return Err(e),
    };
    queue(&proposals[0], wanted.address())?;
    let mut candidates = vec![(Duration::MAX, proposals[0])];
    for proposal in &proposals[1..] {
        gpu.fill_bytes(&found, 0xff)?;
        // One that does not run after all is none.
        if queue(proposal, found.address()).is_ok() && elementwise::same_bytes(gpu, &wanted, &found)? {
            candidates.push((Duration::MAX, *proposal));
        }
    }
    for _ in 0..TURNS {
        for (least, algorithm) in &mut candidates {
            gpu.synchronize()?;
            let started = Instant::now();
            for _ in 0..RUNS {
                queue(algorithm, found.address())?;
            }
            gpu.synchronize()?;
            *least = started.elapsed().min(*least);
        }
    }
    Ok(candidates.into_iter().min_by_key(|(least, _)| *least).expect("the first at least").1)
}
