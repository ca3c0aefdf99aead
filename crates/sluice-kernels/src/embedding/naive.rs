//! The specification: one element at a time.

use sluice_tensor::{DType, Tensor};

/// Rows of the table.
pub fn fwd(tokens: &[u32], table: &Tensor) -> Vec<f64> {
    let [_, m] = table.dims();
    let table = table.to_dtype(DType::F32);
    tokens.iter().flat_map(|&t| (0..m).map(move |p| (t as usize, p))).map(|(t, p)| table.f32()[t * m + p] as f64).collect()
}

/// Rows of `dy` added up by token.
pub fn bwd(dy: &Tensor, tokens: &[u32], vocab: usize) -> Vec<f64> {
    let [_, m] = dy.dims();
    let mut dtable = vec![0.0; vocab * m];
    for (i, &t) in tokens.iter().enumerate() {
        for p in 0..m {
            dtable[t as usize * m + p] += dy.f32()[i * m + p] as f64;
        }
    }
    dtable
}
