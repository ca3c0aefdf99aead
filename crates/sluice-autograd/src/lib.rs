//! A small tape over the fused ops, with recomputing checkpoint segments.
