//! Attention one query row at a time over an explicit list of keys, in f32.

use rayon::prelude::*;
use sluice_tensor::Tensor;

use crate::routed_attention::Dims;

/// A key as one query sees it: row, bias, derivative of the bias by the key's score.
pub(crate) type Seen = (u32, f32, f32);

/// `visible(b, t, g, out)` lists the keys of a query.
pub(crate) fn fwd(
    dims: &Dims,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    lens: &[usize],
    visible: impl Fn(usize, usize, usize, &mut Vec<Seen>) + Sync,
) -> (Tensor, Tensor) {
    let Dims { b: n_batch, t: n_rows, s, h: n_heads, g: n_kv, d } = *dims;
    let (q, k, v) = (q.f32(), k.f32(), v.f32());
    let mut o = vec![0.0f32; n_batch * n_rows * n_heads * d];
    let mut lse = vec![f32::NEG_INFINITY; n_batch * n_rows * n_heads];
    if !o.is_empty() {
        o.par_chunks_mut(n_heads * d).zip(lse.par_chunks_mut(n_heads)).enumerate().for_each_init(
            || (Vec::new(), Vec::new()),
            |(seen, z), (row, (o, lse))| {
                let (b, t) = (row / n_rows, row % n_rows);
                if t >= lens[b] {
                    return;
                }
                for g in 0..n_kv {
                    seen.clear();
                    visible(b, t, g, seen);
                    for h in g * dims.group()..(g + 1) * dims.group() {
                        let q = &q[(row * n_heads + h) * d..][..d];
                        z.clear();
                        z.extend(
                            seen.iter().map(|&(j, beta, _)| dot(q, &k[((b * s + j as usize) * n_kv + g) * d..][..d]) * dims.scale() + beta),
                        );
                        let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                        if max == f32::NEG_INFINITY {
                            continue;
                        }
                        let mut sum = 0.0;
                        let o = &mut o[h * d..][..d];
                        for (&(j, _, _), z) in seen.iter().zip(z.iter()) {
                            let p = (z - max).exp();
                            sum += p;
                            axpy(p, &v[((b * s + j as usize) * n_kv + g) * d..][..d], o);
                        }
                        o.iter_mut().for_each(|o| *o /= sum);
                        lse[h] = max + sum.ln();
                    }
                }
            },
        );
    }
    (Tensor::from_vec(o, [n_batch, n_rows, n_heads, d]), Tensor::from_vec(lse, [n_batch, n_rows, n_heads]))
}

/// `(dq, dk, dv, dscores)`.
pub(crate) fn bwd(
    dims: &Dims,
    [dout, q, k, v, o, lse]: [&Tensor; 6],
    lens: &[usize],
    visible: impl Fn(usize, usize, usize, &mut Vec<Seen>) + Sync,
) -> (Tensor, Tensor, Tensor, Tensor) {
    let Dims { b: n_batch, t: n_rows, s, h: n_heads, g: n_kv, d } = *dims;
    let (dout, q, k, v, o, lse) = (dout.f32(), q.f32(), k.f32(), v.f32(), o.f32(), lse.f32());
    let (mut dq_all, mut dk_all, mut dv_all) = (vec![0.0f32; q.len()], vec![0.0f32; k.len()], vec![0.0f32; k.len()]);
    let mut dscores_all = vec![0.0f32; n_batch * s * n_kv];
    let parts: Vec<_> = (0..n_batch * n_kv)
        .into_par_iter()
        .map(|task| {
            let (b, g) = (task / n_kv, task % n_kv);
            let (mut dq, mut dk, mut dv, mut ds) =
                (vec![0.0f32; n_rows * dims.group() * d], vec![0.0f32; s * d], vec![0.0f32; s * d], vec![0.0f32; s]);
            let mut seen = Vec::new();
            for t in 0..lens[b] {
                seen.clear();
                visible(b, t, g, &mut seen);
                for i in 0..dims.group() {
                    let row = (b * n_rows + t) * n_heads + g * dims.group() + i;
                    if lse[row] == f32::NEG_INFINITY {
                        continue;
                    }
                    let (q, dout, o) = (&q[row * d..][..d], &dout[row * d..][..d], &o[row * d..][..d]);
                    let mean = dot(dout, o);
                    let dq = &mut dq[(t * dims.group() + i) * d..][..d];
                    for &(j, beta, dbeta) in &seen {
                        let at = ((b * s + j as usize) * n_kv + g) * d;
                        let p = (dot(q, &k[at..][..d]) * dims.scale() + beta - lse[row]).exp();
                        let dz = p * (dot(dout, &v[at..][..d]) - mean);
                        ds[j as usize] += dz * dbeta;
                        axpy(dz * dims.scale(), &k[at..][..d], dq);
                        axpy(dz * dims.scale(), q, &mut dk[j as usize * d..][..d]);
                        axpy(p, dout, &mut dv[j as usize * d..][..d]);
                    }
                }
            }
            (dq, dk, dv, ds)
        })
        .collect();
    for (task, (dq, dk, dv, ds)) in parts.into_iter().enumerate() {
        let (b, g) = (task / n_kv, task % n_kv);
        for t in 0..n_rows {
            let n = dims.group() * d;
            dq_all[((b * n_rows + t) * n_heads + g * dims.group()) * d..][..n].copy_from_slice(&dq[t * n..][..n]);
        }
        for j in 0..s {
            let at = (b * s + j) * n_kv + g;
            dk_all[at * d..][..d].copy_from_slice(&dk[j * d..][..d]);
            dv_all[at * d..][..d].copy_from_slice(&dv[j * d..][..d]);
            dscores_all[at] = ds[j];
        }
    }
    (
        Tensor::from_vec(dq_all, [n_batch, n_rows, n_heads, d]),
        Tensor::from_vec(dk_all, [n_batch, s, n_kv, d]),
        Tensor::from_vec(dv_all, [n_batch, s, n_kv, d]),
        Tensor::from_vec(dscores_all, [n_batch, s, n_kv]),
    )
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0.0f32; 16];
    let (a, a_rest) = a.as_chunks::<16>();
    let (b, b_rest) = b.as_chunks::<16>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..16 {
            acc[i] += a[i] * b[i];
        }
    }
    acc.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}
