//! A block per head, a launch per sequence: there are few of them, and the whole is small beside any other op of a layer.

use std::sync::Arc;

use sluice_tensor::cuda::{Gpu, KernelSource, or_raise};
use sluice_tensor::{DType, Tensor};

use super::{RankLabels, Terms};
use crate::gate_score::RECENCY_UNIT;
use crate::launch::{launch, optional, output, sum_to_scalar};

const SOURCE: KernelSource = KernelSource { name: "gate_loss", code: include_str!("gate_loss.cu") };

pub(super) fn fwd(
    gpu: &Arc<Gpu>,
    scores: &Tensor,
    lens: &[usize],
    slopes: &Tensor,
    ranks: &[Option<RankLabels<'_>>],
    terms: &Terms,
) -> (Tensor, Tensor) {
    let [b, t, g] = scores.dims();
    let is_ragged = lens.iter().any(|&len| len < t);
    let mut grad = if is_ragged { Tensor::zeros_on_gpu(gpu, scores.shape(), DType::F32) } else { output(gpu, scores.shape()) };
    let mut losses = output(gpu, [b, g]);
    let (to_grad, to_losses) = (grad.address_mut(), losses.address_mut());
    for (sequence, (&len, rank)) in lens.iter().zip(ranks).enumerate() {
        let rank = rank.as_ref().filter(|rank| !rank.positions.is_empty());
        let positions = rank.map(|rank| or_raise(gpu.upload_slice(rank.positions)));
        let n = rank.map_or(0, |rank| rank.positions.len());
        let at = 4 * (sequence * t * g) as u64;
        let args = [
            (scores.address() + at).into(),
            slopes.into(),
            positions.as_ref().map_or(0, |positions| positions.address()).into(),
            optional(rank.map(|rank| rank.labels)),
            (to_grad + at).into(),
            (to_losses + 4 * (sequence * g) as u64).into(),
            (len as u32).into(),
            (slopes.len() as u32).into(),
            (n as u32).into(),
            (rank.map_or(0, RankLabels::n_kept) as u32).into(),
            terms.rank.into(),
            terms.spread.into(),
            terms.smooth.into(),
            RECENCY_UNIT.into(),
        ];
        // SAFETY: a block per head of a sequence of f32 scores; the caller checked the lengths, the slopes, the positions and their labels.
        // Shared memory holds a number per position.
        unsafe { launch(gpu, &SOURCE, "gate_loss", [g, 1, 1], 1024, 4 * n as u32, &args) };
    }
    (sum_to_scalar(&losses), grad)
}
