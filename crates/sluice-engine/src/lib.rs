//! Int8 inference: reads an artifact folder, runs prefill and token-by-token decode in a bounded cache, samples.
//! Works on token ids; knows nothing about text, HTTP, training or how an artifact came about.

pub mod artifact;
pub mod engine;
pub mod sampling;
pub mod scheduler;
pub mod sequence;

mod forward;
mod layer_cache;
mod weights;

pub use artifact::{Artifact, ArtifactBuilder, ArtifactError};
pub use engine::{Engine, EngineError, Options};
pub use forward::Part;
pub use sampling::{Choice, Sampler, SamplingConfig};
pub use scheduler::{Limits, Scheduler};
pub use sequence::{Sequence, SnapshotError};

#[cfg(target_endian = "big")]
compile_error!("artifacts hold little-endian numbers, which the engine reads in place");
