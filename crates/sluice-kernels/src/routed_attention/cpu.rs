//! Routed attention on the CPU: tiles for the engine that dense attention uses too.

use sluice_tensor::Tensor;

use super::tiles::Routed;
use super::{Dims, GateBias, RoutedGrads, Routing};
use crate::attention_tile::{self, Grads};

pub(super) fn fwd(dims: &Dims, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<GateBias<'_>>, routing: &Routing) -> (Tensor, Tensor) {
    let tiler = Routed { routing, bias, n_keys: dims.s };
    attention_tile::fwd(dims, q, k, v, &routing.lens, routing.window + routing.n_routed, &tiler)
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
    let tiler = Routed { routing, bias, n_keys: dims.s };
    let Grads { dq, dk, dv, dscores } = attention_tile::bwd(dims, [dout, q, k, v, o, lse], &routing.lens, &tiler);
    RoutedGrads { dq, dk, dv, dscores: bias.map(|_| dscores) }
}

pub(super) fn bwd_scores(
    dims: &Dims,
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    bias: GateBias<'_>,
    routing: &Routing,
) -> Tensor {
    let tiler = Routed { routing, bias: Some(bias), n_keys: dims.s };
    attention_tile::bwd_scores(dims, [dout, q, k, v, o, lse], &routing.lens, &tiler)
}
