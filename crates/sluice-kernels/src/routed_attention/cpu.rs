//! Routed attention on the CPU.

use sluice_tensor::Tensor;

use super::{Dims, GateBias, RoutedGrads, Routing, Visibility};
use crate::attention_rows::{self, Seen};

pub(super) fn fwd(dims: &Dims, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<GateBias<'_>>, routing: &Routing) -> (Tensor, Tensor) {
    attention_rows::fwd(dims, q, k, v, &routing.lens, |b, t, g, seen| visible(bias, routing, b, t, g, seen))
}

pub(super) fn bwd(
    dims: &Dims,
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    bias: Option<GateBias<'_>>,
    routing: &Routing,
) -> RoutedGrads {
    let (dq, dk, dv, ds) =
        attention_rows::bwd(dims, [dout, q, k, v, o, lse], &routing.lens, |b, t, g, seen| visible(bias, routing, b, t, g, seen));
    RoutedGrads { dq, dk, dv, dscores: bias.map(|_| ds) }
}

fn visible(bias: Option<GateBias<'_>>, routing: &Routing, b: usize, t: usize, g: usize, seen: &mut Vec<Seen>) {
    let block = routing.block_of(t);
    let local = match routing.visibility {
        Visibility::Causal => routing.first_local(t)..routing.start + t + 1,
        Visibility::Bidirectional if routing.window == 0 => 0..0,
        Visibility::Bidirectional => t.saturating_sub((routing.window - 1) / 2)..(t + routing.window / 2 + 1).min(routing.lens[b]),
    };
    for &row in routing.routed(b, block, g) {
        let row = row as usize;
        if local.contains(&(row + routing.key_offset)) {
            continue;
        }
        let (beta, dbeta) = bias.map_or((0.0, 0.0), |bias| {
            let [_, s, n_kv] = bias.scores.dims();
            GateBias::of(bias.scores.f32()[(b * s + row) * n_kv + g], routing.tau_of(b, block, g), bias.temperature)
        });
        seen.push((row as u32, beta, dbeta));
    }
    seen.extend(local.map(|p| ((p - routing.key_offset) as u32, 0.0, 0.0)));
}
