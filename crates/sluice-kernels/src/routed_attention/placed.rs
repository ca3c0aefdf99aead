//! A routing where the tensors are that it was made from, so that nobody moves it between choosing and attending.

use std::sync::Arc;

use sluice_tensor::Tensor;

use super::{GateBias, GpuRouting, RoutedGrads, Routing, bwd, bwd_on_gpu, bwd_scores, bwd_scores_on_gpu, fwd, fwd_on_gpu};

/// A routing in main memory or on a GPU. Cloning shares it.
#[derive(Clone)]
pub enum PlacedRouting {
    /// In main memory; tensors on a GPU get a copy of it.
    Host(Arc<Routing>),
    /// On the GPU of the tensors.
    Gpu(Arc<GpuRouting>),
}

impl From<Routing> for PlacedRouting {
    fn from(routing: Routing) -> Self {
        Self::Host(Arc::new(routing))
    }
}

impl From<GpuRouting> for PlacedRouting {
    fn from(routing: GpuRouting) -> Self {
        Self::Gpu(Arc::new(routing))
    }
}

impl PlacedRouting {
    /// [`fwd`](super::fwd).
    #[track_caller]
    pub fn fwd(&self, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<GateBias<'_>>) -> (Tensor, Tensor) {
        match self {
            Self::Host(routing) => fwd(q, k, v, bias, routing),
            Self::Gpu(routing) => fwd_on_gpu(q, k, v, bias, routing),
        }
    }

    /// [`bwd`](super::bwd).
    #[track_caller]
    pub fn bwd(
        &self,
        dout: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        lse: &Tensor,
        bias: Option<GateBias<'_>>,
    ) -> RoutedGrads {
        match self {
            Self::Host(routing) => bwd(dout, q, k, v, o, lse, bias, routing),
            Self::Gpu(routing) => bwd_on_gpu(dout, q, k, v, o, lse, bias, routing),
        }
    }

    /// [`bwd_scores`](super::bwd_scores).
    #[track_caller]
    pub fn bwd_scores(&self, dout: &Tensor, q: &Tensor, k: &Tensor, v: &Tensor, o: &Tensor, lse: &Tensor, bias: GateBias<'_>) -> Tensor {
        match self {
            Self::Host(routing) => bwd_scores(dout, q, k, v, o, lse, bias, routing),
            Self::Gpu(routing) => bwd_scores_on_gpu(dout, q, k, v, o, lse, bias, routing),
        }
    }

    /// In main memory; from a GPU the host waits for it.
    pub fn download(&self) -> Arc<Routing> {
        match self {
            Self::Host(routing) => Arc::clone(routing),
            Self::Gpu(routing) => Arc::new(routing.download()),
        }
    }
}
