//! Forward pass of a tile with few queries, as in decoding: one query at a time, its heads together, with the
//! head width along the lanes. Every key and value row is read once for all heads of the group.

use std::f32::consts::{LN_2, LOG2_E};

use super::{Buffer, Inputs, QUERIES, SharedRows, Tile, Workspace};
use crate::simd::Simd;

/// Keys whose inner products are computed together.
const KEYS: usize = 4;

/// As `fwd_tile`, with the same contract; the head width is a multiple of the lanes.
#[inline(always)]
pub(super) unsafe fn fwd<V: Simd>(
    x: &Inputs<'_>,
    b: usize,
    g: usize,
    tile: &Tile<'_>,
    o: SharedRows<'_>,
    lse: SharedRows<'_>,
    ws: &mut Workspace,
) {
    for t in 0..tile.n {
        let masks = tile.masks;
        ws.seen.clear();
        ws.seen.extend(tile.rows[..tile.n_plain].iter().map(|&row| (row, 0.0)));
        let others = tile.rows[tile.n_plain..].iter().enumerate();
        ws.seen.extend(others.map(|(i, &row)| (row, masks.add[(i + 1) * QUERIES + t])).filter(|&(_, add)| add != f32::NEG_INFINITY));
        if ws.seen.is_empty() {
            continue;
        }
        let mut head = 0;
        while head < x.dims.group() {
            // SAFETY: the caller's contract, passed on.
            unsafe {
                let at = x.query_at(b, tile.first + t, g, head);
                match x.dims.group() - head {
                    1 => query::<V, 1>(x, b, g, at, o, lse, ws),
                    2 => query::<V, 2>(x, b, g, at, o, lse, ws),
                    3 => query::<V, 3>(x, b, g, at, o, lse, ws),
                    _ => query::<V, 4>(x, b, g, at, o, lse, ws),
                }
            }
            head += 4;
        }
    }
}

/// `R` heads of one query whose rows of `q` begin at `at`.
#[inline(always)]
unsafe fn query<V: Simd, const R: usize>(
    x: &Inputs<'_>,
    b: usize,
    g: usize,
    at: usize,
    o: SharedRows<'_>,
    lse: SharedRows<'_>,
    ws: &mut Workspace,
) {
    let d = x.dims.d;
    let seen = &ws.seen;
    let stride = seen.len().next_multiple_of(16);
    if ws.logits.len < R * stride {
        ws.logits = Buffer::zeros((R * stride).next_power_of_two());
    }
    let z = ws.logits.ptr(R * stride);
    let q = x.q[at..][..R * d].as_ptr();
    let scale = x.dims.scale() * LOG2_E;
    // SAFETY: `q` has R x D numbers, `z` R x stride; rows of keys lie in `k` and `v` by the caller's contract.
    unsafe {
        let mut j = 0;
        while j + KEYS <= seen.len() {
            let mut keys = [x.k.as_ptr(); KEYS];
            for m in 0..KEYS {
                keys[m] = keys[m].wrapping_add(x.key_at(b, seen[j + m].0, g));
            }
            let dots = dots::<V, R, KEYS>(q, keys, d);
            for m in 0..KEYS {
                for r in 0..R {
                    z.wrapping_add(r * stride + j + m).write(dots[m][r] * scale + seen[j + m].1);
                }
            }
            j += KEYS;
        }
        for j in j..seen.len() {
            let [dots] = dots::<V, R, 1>(q, [x.k.as_ptr().wrapping_add(x.key_at(b, seen[j].0, g))], d);
            for r in 0..R {
                z.wrapping_add(r * stride + j).write(dots[r] * scale + seen[j].1);
            }
        }
        let mut inverse = [0.0; R];
        for r in 0..R {
            let z = z.wrapping_add(r * stride);
            for j in seen.len()..stride {
                z.wrapping_add(j).write(f32::NEG_INFINITY);
            }
            let mut max = V::splat(-1e30);
            for j in (0..stride).step_by(V::LANES) {
                max = V::load(z.wrapping_add(j)).max(max);
            }
            let max = max.max_lane();
            let mut sum = V::splat(0.0);
            for j in (0..stride).step_by(V::LANES) {
                let weight = V::load(z.wrapping_add(j)).sub(V::splat(max)).exp2();
                weight.store(z.wrapping_add(j));
                sum = sum.add(weight);
            }
            let sum = sum.sum();
            inverse[r] = 1.0 / sum;
            lse.row(at / d + r, 1)[0] = max * LN_2 + sum.ln();
        }
        let mut i = 0;
        while i < d {
            let width = if i + 4 * V::LANES <= d { 4 } else { 1 };
            let o = o.row(at, R * d).as_mut_ptr().wrapping_add(i);
            match width {
                4 => average::<V, R, 4>(x, b, g, i, seen, z, stride, &inverse, o),
                _ => average::<V, R, 1>(x, b, g, i, seen, z, stride, &inverse, o),
            }
            i += width * V::LANES;
        }
    }
}

/// Inner products of `M` keys with `R` queries that lie one after the other.
#[inline(always)]
unsafe fn dots<V: Simd, const R: usize, const M: usize>(q: *const f32, keys: [*const f32; M], d: usize) -> [[f32; R]; M] {
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = [[V::splat(0.0); R]; M];
        for i in (0..d).step_by(V::LANES) {
            let q: [V; R] = {
                let mut x = [V::splat(0.0); R];
                for r in 0..R {
                    x[r] = V::load(q.wrapping_add(r * d + i));
                }
                x
            };
            for m in 0..M {
                let key = V::load(keys[m].wrapping_add(i));
                for r in 0..R {
                    acc[m][r] = key.mul_add(q[r], acc[m][r]);
                }
            }
        }
        let mut sums = [[0.0; R]; M];
        for m in 0..M {
            for r in 0..R {
                sums[m][r] = acc[m][r].sum();
            }
        }
        sums
    }
}

/// `N` vectors of the outputs of `R` heads, from column `i` of the values on.
#[inline(always)]
unsafe fn average<V: Simd, const R: usize, const N: usize>(
    x: &Inputs<'_>,
    b: usize,
    g: usize,
    i: usize,
    seen: &[(u32, f32)],
    weights: *const f32,
    stride: usize,
    inverse: &[f32; R],
    o: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = [[V::splat(0.0); N]; R];
        for (j, &(row, _)) in seen.iter().enumerate() {
            let value = x.v.as_ptr().wrapping_add(x.key_at(b, row, g) + i);
            let value: [V; N] = V::load_array(value);
            for r in 0..R {
                let weight = V::broadcast(weights.wrapping_add(r * stride + j));
                for n in 0..N {
                    acc[r][n] = weight.mul_add(value[n], acc[r][n]);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                acc[r][n].mul(V::splat(inverse[r])).store(o.wrapping_add(r * x.dims.d + n * V::LANES));
            }
        }
    }
}
