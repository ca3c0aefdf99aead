//! The least time that attention of one layer can take on a GPU: its FLOPs at the rate of a large product, or its bytes at the
//! rate of a large copy, whichever is longer. Both rates are measured on the spot.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use sluice_kernels::top_k_routing::Budget;
use sluice_tensor::cuda::{Epilogue, Gpu, Mat, gemm};
use sluice_tensor::{DType, Device, Tensor};

use super::attention::random;

/// What a GPU reaches.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Rates {
    /// FLOP/s of an 8192^3 product of bf16 factors.
    pub(super) flops: f64,
    /// Bytes read and written per second by a copy of 1 GiB.
    pub(super) bytes: f64,
}

impl Rates {
    /// Median of seven, on random data: zeros run faster.
    pub(super) fn measure(gpu: &Arc<Gpu>) -> Result<Self> {
        const N: usize = 8192;
        let factor = |seed| random(seed, vec![N, N]).to(&Device::Cuda(Arc::clone(gpu))).to_dtype(DType::Bf16);
        let (a, b) = (factor(1), factor(2));
        let mut c = Tensor::empty_on(gpu, [N, N], DType::Bf16);
        let product = median_of_seven(gpu, || {
            gemm(Mat::new(&a, N, N), Mat::new(&b, N, N), &mut c, 0, N, Epilogue::default());
            Ok(())
        })?;
        let (from, to) = (gpu.alloc(1 << 30)?, gpu.alloc(1 << 30)?);
        let copy = median_of_seven(gpu, || Ok(gpu.copy(&from, 0, &to, 0, 1 << 30)?))?;
        Ok(Self { flops: 2.0 * (N as f64).powi(3) / product, bytes: 2.0 * (1u64 << 30) as f64 / copy })
    }
}

fn median_of_seven(gpu: &Gpu, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let mut seconds = Vec::new();
    for _ in 0..7 {
        gpu.synchronize()?;
        let started = Instant::now();
        for _ in 0..4 {
            run()?;
        }
        gpu.synchronize()?;
        seconds.push(started.elapsed().as_secs_f64() / 4.0);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[3])
}

/// Pairs of a query and a key that it sees, in one head. Without a budget, causal attention to everything.
pub(super) fn visible_pairs(t: usize, budget: Option<&Budget>) -> f64 {
    let Some(&Budget { window, top_k, route_every, .. }) = budget else { return t as f64 * (t as f64 + 1.0) / 2.0 };
    let of_block = |begin: usize| {
        let (first_local, n) = ((begin + 1).saturating_sub(window), route_every.min(t - begin));
        (n * (top_k.min(first_local) + begin - first_local) + n * (n + 1) / 2) as f64
    };
    (0..t).step_by(route_every).map(of_block).sum()
}

/// Seconds of the forward pass, and of forward and backward, of bf16 attention of `[query heads, KV heads, width]`. Every input is read
/// once and every output written once; two products of every pair forward, five backward.
pub(super) fn floor(rates: &Rates, heads: &[usize], t: usize, budget: Option<&Budget>) -> (f64, f64) {
    let (t, [h, g, d]) = (t as f64, [heads[0], heads[1], heads[2]].map(|n| n as f64));
    let scores = if budget.is_some() { 4.0 * t * g } else { 0.0 };
    let (q, kv, lse) = (2.0 * t * h * d, 2.0 * t * g * d, 4.0 * t * h);
    let flops = 4.0 * d * h * visible_pairs(t as usize, budget);
    let time = |flops: f64, bytes: f64| (flops / rates.flops).max(bytes / rates.bytes);
    let forward = time(flops, 2.0 * q + 2.0 * kv + lse + scores);
    let backward = time(2.5 * flops, 4.0 * q + 4.0 * kv + lse + scores);
    (forward, forward + backward)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_pairs_equal_a_count_query_by_query() {
        let budget = Budget { window: 5, top_k: 7, route_every: 4, n_sink: 1 };
        for t in [1, 3, 4, 5, 16, 61] {
            let counted: usize = (0..t)
                .map(|i: usize| {
                    let begin = i / 4 * 4;
                    let first_local = (begin + 1).saturating_sub(5);
                    (first_local..=i).count() + (0..first_local).count().min(7)
                })
                .sum();
            assert_eq!(visible_pairs(t, Some(&budget)), counted as f64, "{t} tokens");
        }
        assert_eq!(visible_pairs(4, None), 10.0);
    }

    #[test]
    fn the_floor_is_bytes_where_few_keys_are_seen_and_flops_where_many_are() {
        let rates = Rates { flops: 1e12, bytes: 1e12 };
        let budget = Budget { window: 1, top_k: 0, route_every: 1, n_sink: 0 };
        // 100 tokens of one head of width 4 that see themselves: q, k, v, o in bf16, lse and scores.
        let (forward, _) = floor(&rates, &[1, 1, 4], 100, Some(&budget));
        assert!((forward * 1e12 - (100.0 * (4.0 * 8.0 + 8.0))).abs() < 1e-6, "{forward}");
        let (forward, both) = floor(&rates, &[1, 1, 4], 100, None);
        assert!((forward * 1e12 - 16.0 * 5050.0).abs() < 1e-6 && (both / forward - 3.5).abs() < 1e-9, "{forward} {both}");
    }
}
