//! A block per document.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource, or_raise};

use super::Terms;
use crate::launch::{optional, output, run};

const SOURCE: KernelSource = KernelSource { name: "token_weights", code: include_str!("token_weights.cu") };

pub(super) fn fwd(gpu: &Arc<Gpu>, figures: &Tensor, local: Option<&Tensor>, draws: &[f32], documents: &[usize], terms: &Terms) -> Tensor {
    let mut weights = output(gpu, [draws.len()]);
    let draws = or_raise(gpu.upload_slice(draws));
    let mut end = 0;
    let ends: Vec<u32> = std::iter::once(0)
        .chain(documents.iter().map(|n| {
            end += *n as u32;
            end
        }))
        .collect();
    let ends = or_raise(gpu.upload_slice(&ends));
    let Terms { sure, share, far_gain, far_weight } = *terms;
    let args = [
        figures.into(),
        optional(local),
        (&draws).into(),
        (&ends).into(),
        sure.into(),
        share.into(),
        far_gain.into(),
        far_weight.into(),
        (&mut weights).into(),
    ];
    // SAFETY: a block per document; documents partition the rows, each with three figures, a draw and a weight.
    unsafe { run(gpu, &SOURCE, "token_weights", [documents.len() as u32, 1, 1], &args) };
    weights
}
