//! The specification of routed attention: one query at a time, everything in f64.

use std::collections::BTreeMap;

use sluice_tensor::Tensor;

use super::{GateBias, Routing, Visibility};

/// `(o [B, T, H, D], lse [B, T, H])`.
pub fn fwd(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<GateBias<'_>>, routing: &Routing) -> (Vec<f64>, Vec<f64>) {
    let [_, _, h, d] = q.dims();
    let mut o = vec![0.0; q.len()];
    let mut lse = vec![f64::NEG_INFINITY; q.len() / d.max(1)];
    for_each_query(q, k, bias, routing, |query| {
        let row = (query.b * q.shape()[1] + query.t) * h + query.h;
        lse[row] = query.lse;
        for key in &query.keys {
            for (o, v) in o[row * d..][..d].iter_mut().zip(at(v, query.b, key.row, query.g)) {
                *o += key.weight * *v as f64;
            }
        }
    });
    (o, lse)
}

/// `(dq [B, T, H, D], dk [B, S, G, D], dv [B, S, G, D], dscores [B, S, G])`.
pub fn bwd(
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    bias: Option<GateBias<'_>>,
    routing: &Routing,
) -> (Vec<f64>, Vec<f64>, Vec<f64>, Vec<f64>) {
    let [_, s, n_kv, d] = k.dims();
    let scale = 1.0 / (d as f64).sqrt();
    let (mut dq, mut dk, mut dv, mut dscores) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()], vec![0.0; k.len() / d.max(1)]);
    for_each_query(q, k, bias, routing, |query| {
        let q_row = at(q, query.b, query.t, query.h);
        let dout_row = at(dout, query.b, query.t, query.h);
        let da: Vec<f64> = query.keys.iter().map(|key| dot(dout_row, at(v, query.b, key.row, query.g))).collect();
        let mean: f64 = query.keys.iter().zip(&da).map(|(key, da)| key.weight * da).sum();
        for (key, da) in query.keys.iter().zip(da) {
            let dz = key.weight * (da - mean);
            let key_at = (query.b * s + key.row) * n_kv + query.g;
            let query_at = (query.b * q.shape()[1] + query.t) * q.shape()[2] + query.h;
            dscores[key_at] += dz * key.dbias;
            for i in 0..d {
                dq[query_at * d + i] += scale * dz * k.f32()[key_at * d + i] as f64;
                dk[key_at * d + i] += scale * dz * q_row[i] as f64;
                dv[key_at * d + i] += key.weight * dout_row[i] as f64;
            }
        }
    });
    (dq, dk, dv, dscores)
}

/// A valid query row with the softmax over the keys it sees.
struct Query {
    b: usize,
    t: usize,
    h: usize,
    g: usize,
    keys: Vec<Key>,
    lse: f64,
}

/// A key as one query sees it.
struct Key {
    row: usize,
    weight: f64,
    dbias: f64,
}

fn for_each_query(q: &Tensor, k: &Tensor, bias: Option<GateBias<'_>>, routing: &Routing, mut f: impl FnMut(Query)) {
    let [n_batch, _, n_heads, d] = q.dims();
    let n_kv = k.shape()[2];
    for b in 0..n_batch {
        for t in 0..routing.lens[b] {
            for h in 0..n_heads {
                let g = h / (n_heads / n_kv);
                let seen = visible(bias, routing, b, t, g);
                let z: Vec<f64> =
                    seen.iter().map(|(&row, &(beta, _))| dot(at(q, b, t, h), at(k, b, row, g)) / (d as f64).sqrt() + beta).collect();
                let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                if max == f64::NEG_INFINITY {
                    continue;
                }
                let lse = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
                let keys = seen.iter().zip(z).map(|((&row, &(_, dbias)), z)| Key { row, weight: (z - lse).exp(), dbias }).collect();
                f(Query { b, t, h, g, keys, lse });
            }
        }
    }
}

/// Rows of `k` that query `t` sees, each with its bias and the derivative of the bias by the score.
pub(super) fn visible(bias: Option<GateBias<'_>>, routing: &Routing, b: usize, t: usize, g: usize) -> BTreeMap<usize, (f64, f64)> {
    let block = routing.block_of(t);
    let mut seen = BTreeMap::new();
    for &row in routing.routed(b, block, g) {
        let row = row as usize;
        let beta = bias.map_or((0.0, 0.0), |bias| {
            let [_, s, n_kv] = bias.scores.dims();
            let score = bias.scores.f32()[(b * s + row) * n_kv + g] as f64;
            log_sigmoid(score, routing.tau_of(b, block, g) as f64, bias.temperature as f64)
        });
        seen.insert(row, beta);
    }
    let local = match routing.visibility {
        Visibility::Causal => routing.first_local(t)..routing.start + t + 1,
        Visibility::Bidirectional if routing.window == 0 => 0..0,
        Visibility::Bidirectional => t.saturating_sub((routing.window - 1) / 2)..(t + routing.window / 2 + 1).min(routing.lens[b]),
    };
    // A key that is both routed and local counts once, as a local one: without a bias.
    seen.extend(local.map(|p| (p - routing.key_offset, (0.0, 0.0))));
    seen
}

fn log_sigmoid(score: f64, tau: f64, temperature: f64) -> (f64, f64) {
    if score == f64::INFINITY || tau == f64::NEG_INFINITY {
        return (0.0, 0.0);
    }
    let x = (score - tau) / temperature;
    (-(1.0 + (-x).exp()).ln(), 1.0 / (1.0 + x.exp()) / temperature)
}

/// Row `[b, i, head, :]` of a `[B, _, heads, D]` tensor.
fn at(x: &Tensor, b: usize, i: usize, head: usize) -> &[f32] {
    let [_, rows, heads, d] = x.dims();
    &x.f32()[((b * rows + i) * heads + head) * d..][..d]
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum()
}
