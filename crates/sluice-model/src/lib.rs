//! Gate, router policies, decoder, bounded cache, cost model; checkpoint import and export.
