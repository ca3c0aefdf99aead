//! A warp per row; gradients of the gate's parameters are sums of columns.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Arg, Gpu, KernelSource, or_raise};

use super::RECENCY_UNIT;
use crate::launch::{ColumnSums, act, formats, of_format, output, over_elements, over_rows, run};

static SOURCES: [KernelSource; 2] = formats!("gate_score", "gate_score.cu");

pub(super) fn fwd(gpu: &Arc<Gpu>, x: &Tensor, weight: &Tensor, bias: &Tensor, recency: &Tensor, positions: &[u32], eps: f32) -> Tensor {
    let ([b, t, m], [gs, _]) = (x.dims(), weight.dims());
    let positions = or_raise(gpu.upload_slice(positions));
    let mut scores = output(gpu, [b, t, gs]);
    let args = [
        act(x),
        weight.into(),
        bias.into(),
        recency.into(),
        (&positions).into(),
        (&mut scores).into(),
        ((b * t) as u32).into(),
        (t as u32).into(),
        (m as u32).into(),
        (gs as u32).into(),
        eps.into(),
        RECENCY_UNIT.into(),
    ];
    // SAFETY: shapes were checked by the caller.
    unsafe { run(gpu, of_format(&SOURCES, x.dtype()), "gate_score_fwd", over_rows(b * t), &args) };
    scores
}

pub(super) fn bwd(
    gpu: &Arc<Gpu>,
    dscores: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    positions: &[u32],
    eps: f32,
    want_dx: bool,
) -> (Tensor, Tensor, Tensor, Option<Tensor>) {
    let ([b, t, m], [gs, _]) = (x.dims(), weight.dims());
    let n = b * t;
    let positions = or_raise(gpu.upload_slice(positions));
    let (mut inv_rms, mut ages) = (output(gpu, [n]), output(gpu, [n]));
    let mut dx = want_dx.then(|| output(gpu, x.shape()));
    let args = [
        dscores.into(),
        act(x),
        weight.into(),
        (&positions).into(),
        (&mut inv_rms).into(),
        (&mut ages).into(),
        dx.as_mut().map_or(Arg::U64(0), Arg::from),
        (n as u32).into(),
        (t as u32).into(),
        (m as u32).into(),
        (gs as u32).into(),
        eps.into(),
        RECENCY_UNIT.into(),
    ];
    // SAFETY: shapes were checked by the caller.
    unsafe { run(gpu, of_format(&SOURCES, x.dtype()), "gate_score_bwd", over_rows(n), &args) };
    let sums = |x, row_scale, coefficients, n_out, m| ColumnSums { x, y: None, row_scale, coefficients, n_out }.run(n, m);
    let dweight = sums(x, Some(&inv_rms), Some(dscores), gs, m);
    let dbias = sums(dscores, None, None, 1, gs).reshape([gs]);
    let drecency = sums(dscores, Some(&ages), None, 1, gs).reshape([gs]);
    (dweight, dbias, drecency, dx)
}

pub(super) fn add_recency(gpu: &Arc<Gpu>, scores: &Tensor, slopes: &[f32]) -> Tensor {
    let [_, t, g] = scores.dims();
    let slopes = or_raise(gpu.upload_slice(slopes));
    let mut later = output(gpu, scores.shape());
    let n = scores.len();
    let args = [
        scores.into(),
        (&slopes).into(),
        (&mut later).into(),
        (n as u64).into(),
        (t as u32).into(),
        (g as u32).into(),
        RECENCY_UNIT.into(),
    ];
    // SAFETY: both have `n` elements in rows of `g`, the caller checked the slopes.
    unsafe { run(gpu, &SOURCES[0], "add_recency", over_elements(n), &args) };
    later
}
