//! Which queries and keys meet: tiles of keys with the queries that they share, one task each. Tiles are the same
//! for any number of threads.

use rayon::prelude::*;
use sluice_tensor::Tensor;

use super::Dims;
use super::tile::{KEYS, Row, add_mass};

pub(super) fn future_mass(
    dims: &Dims,
    q: &[f32],
    k: &[f32],
    lse: &[f32],
    key_weight: Option<&[f32]>,
    query_weight: Option<&[f32]>,
    positions: &[Vec<u32>],
    window: usize,
    horizon: usize,
    power: f32,
    lens: &[usize],
) -> Vec<Tensor> {
    let &Dims { batch, t, n_heads, n_kv_heads, head_dim } = dims;
    let group = dims.group();
    (0..batch)
        .map(|b| {
            // In order of position, neighbours share nearly all of their queries.
            let mut order: Vec<usize> = (0..positions[b].len()).collect();
            order.sort_unstable_by_key(|&i| positions[b][i]);
            let tiles = tiles(&order, &positions[b], (horizon / 2).max(KEYS));
            // [tile][G][keys of the tile]
            let sums: Vec<Vec<f32>> = tiles
                .par_iter()
                .flat_map_iter(|tile| (0..n_kv_heads).map(move |g| (tile, g)))
                .map(|(tile, g)| {
                    let at: Vec<usize> = tile.iter().map(|&i| positions[b][i] as usize).collect();
                    let keys: Vec<usize> = at.iter().map(|j| ((b * t + j) * n_kv_heads + g) * head_dim).collect();
                    let (first, last) = (at[0] + window, (at[at.len() - 1] + window + horizon).min(lens[b]));
                    let mut total = vec![0.0; at.len()];
                    for h in g * group..(g + 1) * group {
                        let rows: Vec<Row> = (first..last.max(first))
                            .map(|i| Row {
                                at: ((b * t + i) * n_heads + h) * head_dim,
                                // j + window <= i < j + window + horizon
                                first_key: at.partition_point(|j| j + window + horizon <= i),
                                end_key: at.partition_point(|j| j + window <= i),
                                // exp(z - lse)^power = exp(power z - power lse)
                                lse: power * lse[(b * t + i) * n_heads + h],
                                weight: query_weight.map_or(1.0, |w| w[b * t + i]),
                            })
                            .collect();
                        let mut mass = vec![0.0; at.len()];
                        add_mass(q, &rows, k, &keys, head_dim, power * dims.scale(), &mut mass);
                        for ((total, mass), &j) in total.iter_mut().zip(mass).zip(&at) {
                            *total += mass * key_weight.map_or(1.0, |w| w[(b * t + j) * n_heads + h]);
                        }
                    }
                    total
                })
                .collect();
            let mut mass = vec![0.0; positions[b].len() * n_kv_heads];
            for (i, sums) in sums.into_iter().enumerate() {
                let (tile, g) = (tiles[i / n_kv_heads], i % n_kv_heads);
                for (&key, sum) in tile.iter().zip(sums) {
                    mass[key * n_kv_heads + g] = sum;
                }
            }
            Tensor::from_vec(mass, [positions[b].len(), n_kv_heads])
        })
        .collect()
}

/// Cut the keys, `order`ed by position, into runs of at most `KEYS` keys over at most `span` positions.
pub(super) fn tiles<'a>(order: &'a [usize], positions: &[u32], span: usize) -> Vec<&'a [usize]> {
    let mut tiles = vec![];
    let mut rest = order;
    while let Some(&first) = rest.first() {
        let end = positions[first] as usize + span;
        let n = rest.iter().take(KEYS).take_while(|&&i| (positions[i] as usize) < end).count();
        let (tile, others) = rest.split_at(n);
        tiles.push(tile);
        rest = others;
    }
    tiles
}

pub(super) fn block_mass(dims: &Dims, q: &[f32], k: &[f32], lse: &[f32], route_every: usize, power: f32, lens: &[usize]) -> Tensor {
    let &Dims { batch, t, n_heads, n_kv_heads, head_dim } = dims;
    let n_blocks = t.div_ceil(route_every);
    let mut mass = vec![0.0; batch * n_blocks * n_kv_heads * t];
    // [B, n_blocks, G]
    mass.par_chunks_mut(t.max(1)).enumerate().for_each(|(i, mass)| {
        let (b, block, g) = (i / (n_kv_heads * n_blocks), i / n_kv_heads % n_blocks, i % n_kv_heads);
        let end = ((block + 1) * route_every).min(lens[b]);
        for (tile, mass) in mass[..end].chunks_mut(KEYS).enumerate() {
            let first_key = tile * KEYS;
            let keys: Vec<usize> = (first_key..first_key + mass.len()).map(|j| ((b * t + j) * n_kv_heads + g) * head_dim).collect();
            // Heads inside, so that the bounds do not fall from row to row.
            let rows: Vec<Row> = (first_key.max(block * route_every)..end)
                .flat_map(|i| (g * dims.group()..(g + 1) * dims.group()).map(move |h| (i, h)))
                .map(|(i, h)| Row {
                    at: ((b * t + i) * n_heads + h) * head_dim,
                    first_key: 0,
                    end_key: (i + 1 - first_key).min(keys.len()),
                    lse: power * lse[(b * t + i) * n_heads + h],
                    weight: 1.0,
                })
                .collect();
            add_mass(q, &rows, k, &keys, head_dim, power * dims.scale(), mass);
        }
    });
    Tensor::from_vec(mass, [batch, n_blocks, n_kv_heads, t])
}
