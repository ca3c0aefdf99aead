//! Tiles of 64 keys. Their queries are shared out to several blocks where there are few tiles; the parts are added in order.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource, or_raise};

use super::Dims;
use super::cpu::tiles;
use super::tile::KEYS;
use crate::launch::{launch, output, sum_of_parts};

const SOURCE: KernelSource = KernelSource { name: "attention_mass", code: include_str!("attention_mass.cu") };
const THREADS: u32 = 256;

/// Blocks that keep a large GPU busy.
const BLOCKS: usize = 264;

pub(super) fn future_mass(
    gpu: &Arc<Gpu>,
    dims: &Dims,
    [q, k, lse]: [&Tensor; 3],
    key_weight: Option<&Tensor>,
    query_weight: Option<&Tensor>,
    positions: &[Vec<u32>],
    window: usize,
    horizon: usize,
    power: f32,
    lens: &[usize],
) -> Vec<Tensor> {
    let &Dims { batch, t, n_heads, n_kv_heads, head_dim } = dims;
    let of_sequence = |b: usize, positions: &[u32]| {
        let n = positions.len();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_unstable_by_key(|&i| positions[i]);
        let tiles = tiles(&order, positions, (horizon / 2).max(KEYS));
        let ends = tiles.iter().scan(0, |end, tile| {
            *end += tile.len() as u32;
            Some(*end)
        });
        let starts: Vec<u32> = [0].into_iter().chain(ends).collect();
        let keys: Vec<u32> = order.iter().flat_map(|&i| [positions[i], i as u32]).collect();
        let (keys, starts) = (or_raise(gpu.upload_slice(&keys)), or_raise(gpu.upload_slice(&starts)));
        let parts = (BLOCKS / (tiles.len() * n_kv_heads).max(1)).clamp(1, 16);
        let mut partial = output(gpu, [parts, n, n_kv_heads]);
        let rows = (b * t * 4) as u64; // bytes of a column of numbers before this sequence
        let args = [
            (q.address() + rows * (n_heads * head_dim) as u64).into(),
            (k.address() + rows * (n_kv_heads * head_dim) as u64).into(),
            (lse.address() + rows * n_heads as u64).into(),
            key_weight.map_or(0, |w| w.address() + rows * n_heads as u64).into(),
            query_weight.map_or(0, |w| w.address() + rows).into(),
            (&keys).into(),
            (&starts).into(),
            (&mut partial).into(),
            (n as u32).into(),
            (lens[b] as u32).into(),
            (window as u32).into(),
            ((window + horizon).min(u32::MAX as usize) as u32).into(),
            (n_heads as u32).into(),
            (n_kv_heads as u32).into(),
            (head_dim as u32).into(),
            power.into(),
            dims.scale().into(),
        ];
        // SAFETY: the caller checked shapes and positions; a tile has 1 to `KEYS` keys; every part writes every key.
        unsafe { launch(gpu, &SOURCE, "future_mass", [tiles.len(), n_kv_heads, parts], THREADS, 0, &args) };
        sum_of_parts(&partial, parts, [n, n_kv_heads])
    };
    (0..batch).map(|b| of_sequence(b, &positions[b])).collect()
}

pub(super) fn block_mass(gpu: &Arc<Gpu>, dims: &Dims, [q, k, lse]: [&Tensor; 3], route_every: usize, power: f32, lens: &[usize]) -> Tensor {
    let &Dims { batch, t, n_heads, n_kv_heads, head_dim } = dims;
    let n_blocks = t.div_ceil(route_every);
    let lens = or_raise(gpu.upload_slice(&lens.iter().map(|&n| n as u32).collect::<Vec<_>>()));
    let mut mass = output(gpu, [batch, n_blocks, n_kv_heads, t]);
    let args = [
        q.into(),
        k.into(),
        lse.into(),
        (&lens).into(),
        (&mut mass).into(),
        (t as u32).into(),
        (route_every as u32).into(),
        (n_heads as u32).into(),
        (n_kv_heads as u32).into(),
        (head_dim as u32).into(),
        power.into(),
        dims.scale().into(),
    ];
    // SAFETY: the caller checked shapes and lengths; the grid covers `mass`.
    unsafe { launch(gpu, &SOURCE, "block_mass", [t.div_ceil(KEYS), n_blocks, batch * n_kv_heads], THREADS, 0, &args) };
    mass
}
