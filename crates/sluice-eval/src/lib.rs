//! Held-out loss, needles, baselines and the report.

pub mod bootstrap;
pub mod inside;
pub mod measured;
pub mod needle;
pub mod nll;
pub mod quality;
pub mod recall;
pub mod report;
mod rng;
