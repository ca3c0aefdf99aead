//! How much attention keys receive, without ever holding the attention matrix: the label that a gate learns to
//! predict ([`future_mass`]) and the score of an attention-sum router ([`block_mass`]).
//!
//! `a_tj = exp(q_t . k_j / sqrt(D) - lse_t)` is the attention of dense causal attention, of which the forward pass
//! left `lse`. Queries and keys may be f32 or bf16; products are f32 in every precision. Knows nothing about gates or labels' logarithms.

pub(crate) mod cases;
mod cpu;
mod cuda;
pub mod naive;
mod tile;

#[cfg(test)]
mod tests;

use sluice_tensor::{DType, Tensor};

/// Attention that chosen keys will receive once they have left the window.
///
/// For each `j` of `positions[b]` and each KV head: the sum over the queries `t` in
/// `[j + window, min(j + window + horizon, lens[b]))` and over the query heads `h` of the group of
/// `a_tj^power * key_weight[b, j, h] * query_weight[b, t]`. `q [B, T, H, D]`, `k [B, T, G, D]`, `lse [B, T, H]`,
/// `key_weight [B, T, H]`, `query_weight [B, T]`. Returns `[n_b, G]` per sequence, in the order of `positions[b]`.
#[track_caller]
pub fn future_mass(
    q: &Tensor,
    k: &Tensor,
    lse: &Tensor,
    key_weight: Option<&Tensor>,
    query_weight: Option<&Tensor>,
    positions: &[Vec<u32>],
    window: usize,
    horizon: usize,
    power: f32,
    lens: &[usize],
) -> Vec<Tensor> {
    let dims = Dims::of("future_mass", q, k, lse, lens);
    if let Some(w) = key_weight {
        assert_eq!(w.shape(), lse.shape(), "future_mass: key_weight with q {:?}", q.shape());
    }
    if let Some(w) = query_weight {
        assert_eq!(w.shape(), [dims.batch, dims.t], "future_mass: query_weight with q {:?}", q.shape());
    }
    assert_eq!(positions.len(), dims.batch, "future_mass: lists of positions with q {:?}", q.shape());
    let last = positions.iter().flatten().max();
    assert!(last.is_none_or(|&p| (p as usize) < dims.t), "future_mass: position {last:?} is outside k {:?}", k.shape());
    let [q, k] = [q, k].map(|x| x.to_dtype(DType::F32));
    if let Some(gpu) = q.gpu() {
        return cuda::future_mass(gpu, &dims, [&q, &k, lse], key_weight, query_weight, positions, window, horizon, power, lens);
    }
    let (key_weight, query_weight) = (key_weight.map(Tensor::f32), query_weight.map(Tensor::f32));
    cpu::future_mass(&dims, q.f32(), k.f32(), lse.f32(), key_weight, query_weight, positions, window, horizon, power, lens)
}

/// Attention that each key receives from each block of `route_every` queries, `a_tj^power` summed over the block and the
/// query heads of the group: `[B, n_blocks, G, T]`. `q [B, T, H, D]`, `k [B, T, G, D]`, `lse [B, T, H]`.
#[track_caller]
pub fn block_mass(q: &Tensor, k: &Tensor, lse: &Tensor, route_every: usize, power: f32, lens: &[usize]) -> Tensor {
    let dims = Dims::of("block_mass", q, k, lse, lens);
    assert!(route_every > 0, "block_mass: blocks of 0 queries");
    let [q, k] = [q, k].map(|x| x.to_dtype(DType::F32));
    if let Some(gpu) = q.gpu() {
        return cuda::block_mass(gpu, &dims, [&q, &k, lse], route_every, power, lens);
    }
    cpu::block_mass(&dims, q.f32(), k.f32(), lse.f32(), route_every, power, lens)
}

/// Sizes, checked.
struct Dims {
    batch: usize,
    t: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
}

impl Dims {
    #[track_caller]
    fn of(op: &str, q: &Tensor, k: &Tensor, lse: &Tensor, lens: &[usize]) -> Self {
        let ([batch, t, n_heads, head_dim], [kb, kt, n_kv_heads, kd]) = (q.dims(), k.dims());
        assert!(
            (kb, kt, kd) == (batch, t, head_dim) && n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads),
            "{op}: q {:?} with k {:?}",
            q.shape(),
            k.shape()
        );
        assert_eq!(lse.shape(), [batch, t, n_heads], "{op}: lse with q {:?}", q.shape());
        assert!(lens.len() == batch && lens.iter().all(|&n| n <= t), "{op}: lengths {lens:?} with q {:?}", q.shape());
        Self { batch, t, n_heads, n_kv_heads, head_dim }
    }

    /// Query heads per KV head.
    fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}
