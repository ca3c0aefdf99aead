//! Held-out loss, needles, baselines and the report.

pub mod bootstrap;
pub mod needle;
pub mod report;
mod rng;
