//! Held-out loss, needles, baselines and the report.
