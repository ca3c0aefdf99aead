//! A block per head: there are few of them, and the whole is small beside any other op of a layer.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource, or_raise};

use super::{RankLabels, Terms};
use crate::gate_score::RECENCY_UNIT;
use crate::launch::{launch, optional, output, sum_to_scalar};

const SOURCE: KernelSource = KernelSource { name: "gate_loss", code: include_str!("gate_loss.cu") };

pub(super) fn fwd(gpu: &Arc<Gpu>, scores: &Tensor, slopes: &Tensor, rank: Option<&RankLabels<'_>>, terms: &Terms) -> (Tensor, Tensor) {
    let [_, t, g] = scores.dims();
    let (mut grad, mut losses) = (output(gpu, scores.shape()), output(gpu, [g]));
    let positions = rank.map(|rank| or_raise(gpu.upload_slice(rank.positions)));
    let n = rank.map_or(0, |rank| rank.positions.len());
    let args = [
        scores.into(),
        slopes.into(),
        positions.as_ref().map_or(0, |positions| positions.address()).into(),
        optional(rank.map(|rank| rank.labels)),
        (&mut grad).into(),
        (&mut losses).into(),
        (t as u32).into(),
        (slopes.len() as u32).into(),
        (n as u32).into(),
        (rank.map_or(0, RankLabels::n_kept) as u32).into(),
        terms.rank.into(),
        terms.spread.into(),
        terms.smooth.into(),
        RECENCY_UNIT.into(),
    ];
    // SAFETY: a block per head of `scores`; the caller checked the slopes, the positions and their labels. Shared memory holds a number
    // per position.
    unsafe { launch(gpu, &SOURCE, "gate_loss", [g, 1, 1], 1024, 4 * n as u32, &args) };
    (sum_to_scalar(&losses), grad)
}
