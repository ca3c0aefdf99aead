//! Tiles of queries x keys through the matrix product; the exponentials of a tile are summed over its queries
//! before the next tile replaces it. Tiles are the same for any number of threads.

use rayon::prelude::*;
use sluice_tensor::Tensor;
use sluice_tensor::gemm::{Mat, gemm};

use super::Dims;
use crate::vector_math::{exp, vectorised};

/// Keys and queries of a tile: small enough for the first-level cache and for `gemm` to stay on its thread.
const KEYS: usize = 64;
const QUERIES: usize = 128;

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
                    let keys: Vec<f32> =
                        at.iter().flat_map(|j| &k[((b * t + j) * n_kv_heads + g) * head_dim..][..head_dim]).copied().collect();
                    let (first, last) = (at[0] + window, (at[at.len() - 1] + window + horizon).min(lens[b]));
                    let mut tile = Tile::new(dims.scale());
                    let mut total = vec![0.0; at.len()];
                    for h in g * group..(g + 1) * group {
                        let mut mass = vec![0.0; at.len()];
                        for from in (first..last).step_by(QUERIES) {
                            let n = QUERIES.min(last - from);
                            tile.rows.clear();
                            tile.rows.extend((from..from + n).map(|t| Row {
                                // j + window <= t < j + window + horizon
                                first_key: at.partition_point(|j| j + window + horizon <= t),
                                end_key: at.partition_point(|j| j + window <= t),
                                lse: lse[(b * dims.t + t) * n_heads + h],
                                weight: query_weight.map_or(1.0, |w| w[b * dims.t + t]),
                            }));
                            let queries =
                                Mat::with_row_stride(&q[((b * t + from) * n_heads + h) * head_dim..], n, head_dim, n_heads * head_dim);
                            tile.add(queries, Mat::new(&keys, at.len(), head_dim), &mut mass);
                        }
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
fn tiles<'a>(order: &'a [usize], positions: &[u32], span: usize) -> Vec<&'a [usize]> {
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

pub(super) fn block_mass(dims: &Dims, q: &[f32], k: &[f32], lse: &[f32], route_every: usize, lens: &[usize]) -> Tensor {
    let &Dims { batch, t, n_heads, n_kv_heads, head_dim } = dims;
    let n_blocks = t.div_ceil(route_every);
    let mut mass = vec![0.0; batch * n_blocks * n_kv_heads * t];
    // [B, n_blocks, G]
    mass.par_chunks_mut(t.max(1)).enumerate().for_each(|(i, mass)| {
        let (b, block, g) = (i / (n_kv_heads * n_blocks), i / n_kv_heads % n_blocks, i % n_kv_heads);
        let end = ((block + 1) * route_every).min(lens[b]);
        let mut tile = Tile::new(dims.scale());
        for h in g * dims.group()..(g + 1) * dims.group() {
            for from in (block * route_every..end).step_by(QUERIES) {
                let n = QUERIES.min(end - from);
                let queries = Mat::with_row_stride(&q[((b * t + from) * n_heads + h) * head_dim..], n, head_dim, n_heads * head_dim);
                for first_key in (0..from + n).step_by(KEYS) {
                    let n_keys = KEYS.min(from + n - first_key);
                    tile.rows.clear();
                    tile.rows.extend((from..from + n).map(|t| Row {
                        first_key: 0,
                        end_key: (t + 1).saturating_sub(first_key).min(n_keys),
                        lse: lse[(b * dims.t + t) * n_heads + h],
                        weight: 1.0,
                    }));
                    let keys = Mat::with_row_stride(
                        &k[((b * t + first_key) * n_kv_heads + g) * head_dim..],
                        n_keys,
                        head_dim,
                        n_kv_heads * head_dim,
                    );
                    tile.add(queries, keys, &mut mass[first_key..first_key + n_keys]);
                }
            }
        }
    });
    Tensor::from_vec(mass, [batch, n_blocks, n_kv_heads, t])
}

/// Room for the logits of a tile, and what is known of its queries.
struct Tile {
    logits: Vec<f32>,
    rows: Vec<Row>,
    scale: f32,
}

/// A query of a tile.
struct Row {
    /// Keys of the tile that count: `first_key..end_key`.
    first_key: usize,
    end_key: usize,
    lse: f32,
    weight: f32,
}

impl Tile {
    fn new(scale: f32) -> Self {
        Self { logits: vec![0.0; QUERIES * KEYS], rows: Vec::with_capacity(QUERIES), scale }
    }

    /// `mass[j] += sum_t weight_t exp(scale q_t . k_j - lse_t)` for `queries [rows, D]` and `keys [mass.len(), D]`.
    fn add(&mut self, queries: Mat<'_>, keys: Mat<'_>, mass: &mut [f32]) {
        let logits = &mut self.logits[..self.rows.len() * mass.len()];
        gemm(queries, keys.t(), logits, mass.len(), false);
        sum_exp_rows(logits, &self.rows, self.scale, mass);
    }
}

vectorised! {
    fn sum_exp_rows(logits: &[f32], rows: &[Row], scale: f32, mass: &mut [f32]) {
        for (z, row) in logits.chunks_exact(mass.len()).zip(rows) {
            // Nothing counts for a padded query, whose `lse` is -inf.
            if row.first_key >= row.end_key || row.weight == 0.0 {
                continue;
            }
            let seen = row.first_key..row.end_key;
            for (mass, z) in mass[seen.clone()].iter_mut().zip(&z[seen]) {
                *mass += row.weight * exp(z.mul_add(scale, -row.lse));
            }
        }
    }
}
