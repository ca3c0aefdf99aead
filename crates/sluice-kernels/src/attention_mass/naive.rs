//! The specification: every attention weight on its own, in f64.

use sluice_tensor::Tensor;

/// `a_tj` of query head `h`.
fn attention(q: &Tensor, k: &Tensor, lse: &Tensor, b: usize, h: usize, t: usize, j: usize) -> f64 {
    let ([_, len, n_heads, d], [_, _, n_kv_heads, _]) = (q.dims(), k.dims());
    let q_row = &q.f32()[((b * len + t) * n_heads + h) * d..][..d];
    let k_row = &k.f32()[((b * len + j) * n_kv_heads + h / (n_heads / n_kv_heads)) * d..][..d];
    let dot: f64 = q_row.iter().zip(k_row).map(|(q, k)| *q as f64 * *k as f64).sum();
    (dot / (d as f64).sqrt() - lse.f32()[(b * len + t) * n_heads + h] as f64).exp()
}

/// `[n_b, G]` per sequence.
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
) -> Vec<Vec<f64>> {
    let ([batch, len, n_heads, _], [_, _, n_kv_heads, _]) = (q.dims(), k.dims());
    let mut result = vec![];
    for b in 0..batch {
        let mut mass = vec![0.0; positions[b].len() * n_kv_heads];
        for (i, &j) in positions[b].iter().enumerate() {
            let j = j as usize;
            for h in 0..n_heads {
                for t in j + window..(j + window + horizon).min(lens[b]) {
                    let of_key = key_weight.map_or(1.0, |w| w.f32()[(b * len + j) * n_heads + h] as f64);
                    let of_query = query_weight.map_or(1.0, |w| w.f32()[b * len + t] as f64);
                    mass[i * n_kv_heads + h / (n_heads / n_kv_heads)] +=
                        attention(q, k, lse, b, h, t, j).powf(power as f64) * of_key * of_query;
                }
            }
        }
        result.push(mass);
    }
    result
}

/// `[B, n_blocks, G, T]`.
pub fn block_mass(q: &Tensor, k: &Tensor, lse: &Tensor, route_every: usize, power: f32, lens: &[usize]) -> Vec<f64> {
    let ([batch, len, n_heads, _], [_, _, n_kv_heads, _]) = (q.dims(), k.dims());
    let n_blocks = len.div_ceil(route_every);
    let mut mass = vec![0.0; batch * n_blocks * n_kv_heads * len];
    for b in 0..batch {
        for t in 0..lens[b] {
            for h in 0..n_heads {
                for j in 0..=t {
                    let row = (b * n_blocks + t / route_every) * n_kv_heads + h / (n_heads / n_kv_heads);
                    mass[row * len + j] += attention(q, k, lse, b, h, t, j).powf(power as f64);
                }
            }
        }
    }
    mass
}
