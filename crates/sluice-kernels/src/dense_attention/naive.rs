//! The specification of dense attention: one query at a time, everything in f64.

use sluice_tensor::Tensor;

use super::WHOLE;

/// `(o [B, T, H, D], lse [B, T, H])`.
pub fn fwd(q: &Tensor, k: &Tensor, v: &Tensor, start: usize, lens: &[usize]) -> (Vec<f64>, Vec<f64>) {
    let [_, n_rows, n_heads, d] = q.dims();
    let mut o = vec![0.0; q.len()];
    let mut lse = vec![f64::NEG_INFINITY; q.len() / d.max(1)];
    for_each_query(q, k, start, lens, |b, t, h, g, weights, row_lse| {
        let row = (b * n_rows + t) * n_heads + h;
        lse[row] = row_lse;
        for (j, a) in weights.iter().enumerate() {
            for (o, v) in o[row * d..][..d].iter_mut().zip(at(v, b, j, g)) {
                *o += a * *v as f64;
            }
        }
    });
    (o, lse)
}

/// `(dq [B, T, H, D], dk [B, S, G, D], dv [B, S, G, D])`.
pub fn bwd(dout: &Tensor, q: &Tensor, k: &Tensor, v: &Tensor, start: usize, lens: &[usize]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let [_, n_rows, n_heads, d] = q.dims();
    let [_, s, n_kv, _] = k.dims();
    let scale = 1.0 / (d as f64).sqrt();
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for_each_query(q, k, start, lens, |b, t, h, g, weights, _| {
        let q_row = at(q, b, t, h);
        let dout_row = at(dout, b, t, h);
        let da: Vec<f64> = (0..weights.len()).map(|j| dot(dout_row, at(v, b, j, g))).collect();
        let mean: f64 = weights.iter().zip(&da).map(|(a, da)| a * da).sum();
        for (j, (a, da)) in weights.iter().zip(da).enumerate() {
            let dz = a * (da - mean);
            let key_at = (b * s + j) * n_kv + g;
            let query_at = (b * n_rows + t) * n_heads + h;
            for i in 0..d {
                dq[query_at * d + i] += scale * dz * k.f32()[key_at * d + i] as f64;
                dk[key_at * d + i] += scale * dz * q_row[i] as f64;
                dv[key_at * d + i] += a * dout_row[i] as f64;
            }
        }
    });
    (dq, dk, dv)
}

/// Calls `f(b, t, h, g, attention over the keys that it sees, lse)` for every valid query row.
fn for_each_query(q: &Tensor, k: &Tensor, start: usize, lens: &[usize], mut f: impl FnMut(usize, usize, usize, usize, &[f64], f64)) {
    let [n_batch, _, n_heads, d] = q.dims();
    let n_kv = k.shape()[2];
    for b in 0..n_batch {
        for t in 0..lens[b] {
            for h in 0..n_heads {
                let g = h / (n_heads / n_kv);
                let end = if start == WHOLE { lens[b] } else { start + t + 1 };
                let z: Vec<f64> = (0..end).map(|j| dot(at(q, b, t, h), at(k, b, j, g)) / (d as f64).sqrt()).collect();
                let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let lse = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
                let weights: Vec<f64> = z.iter().map(|z| (z - lse).exp()).collect();
                f(b, t, h, g, &weights, lse);
            }
        }
    }
}

/// Row `[b, i, head, :]` of a `[B, _, heads, D]` tensor.
fn at(x: &Tensor, b: usize, i: usize, head: usize) -> &[f32] {
    let [_, rows, heads, d] = x.dims();
    &x.f32()[((b * rows + i) * heads + head) * d..][..d]
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum()
}

/// [`fwd`] and [`bwd`] with the roundings of tensor cores, in f64 otherwise: what was a factor of a product and what is stored
/// has the 8 bits of bf16. Weights are rounded relative to the largest of their query; the mean that the gradient of the
/// softmax takes off comes from the stored result. `(o, dq, dk, dv)`.
pub fn rounded(dout: &Tensor, q: &Tensor, k: &Tensor, v: &Tensor, start: usize, lens: &[usize]) -> [Vec<f64>; 4] {
    let round = |x: f64| half::bf16::from_f64(x).to_f64();
    let [_, n_rows, n_heads, d] = q.dims();
    let [_, s, n_kv, _] = k.dims();
    let scale = 1.0 / (d as f64).sqrt();
    let [mut o, mut dq, mut dk, mut dv] = [q, q, k, v].map(|x| vec![0.0; x.len()]);
    for_each_query(q, k, start, lens, |b, t, h, g, weights, _| {
        let (q_row, dout_row) = (at(q, b, t, h), at(dout, b, t, h));
        let query_at = ((b * n_rows + t) * n_heads + h) * d;
        let key_at = |j: usize| ((b * s + j) * n_kv + g) * d;
        let largest = weights.iter().copied().fold(0.0, f64::max);
        for (j, a) in weights.iter().enumerate() {
            let a = round(a / largest) * largest;
            (0..d).for_each(|i| o[query_at + i] += a * v.f32()[key_at(j) + i] as f64);
        }
        o[query_at..][..d].iter_mut().for_each(|o| *o = round(*o));
        let mean: f64 = o[query_at..][..d].iter().zip(dout_row).map(|(o, dout)| o * *dout as f64).sum();
        for (j, a) in weights.iter().enumerate() {
            let dz = round(a * (dot(dout_row, at(v, b, j, g)) - mean));
            for i in 0..d {
                dq[query_at + i] += scale * dz * k.f32()[key_at(j) + i] as f64;
                dk[key_at(j) + i] += scale * dz * q_row[i] as f64;
                dv[key_at(j) + i] += round(*a) * dout_row[i] as f64;
            }
        }
    });
    [o, dq, dk, dv].map(|x| x.into_iter().map(round).collect())
}
