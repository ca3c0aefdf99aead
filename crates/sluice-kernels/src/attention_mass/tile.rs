//! One pass over queries x keys that keeps only sums: logits are made in registers, turned into weights, added
//! to the sum of their key and forgotten.

use crate::simd::{Simd, dispatch};

/// Keys of a task; they share their queries.
pub(super) const KEYS: usize = 64;
/// Widest panel of any machine: two vectors of sixteen.
const MAX_LANES: usize = 32;

/// A query of a tile.
pub(super) struct Row {
    /// Offset of its numbers in `q`.
    pub(super) at: usize,
    /// Keys of the tile that count, `first_key..end_key`; neither bound falls from one row to the next.
    pub(super) first_key: usize,
    /// See `first_key`.
    pub(super) end_key: usize,
    /// Logarithm of the softmax's denominator.
    pub(super) lse: f32,
    /// Factor of the row's attention.
    pub(super) weight: f32,
}

/// `mass[i] += sum over rows of weight exp(scale q . k_i - lse)` for the keys at the offsets `keys` in `k`.
pub(super) fn add_mass(q: &[f32], rows: &[Row], k: &[f32], keys: &[usize], d: usize, scale: f32, mass: &mut [f32]) {
    assert_eq!(keys.len(), mass.len(), "one sum per key");
    assert!(rows.iter().all(|row| row.at + d <= q.len()) && keys.iter().all(|at| at + d <= k.len()), "rows outside their tensors");
    let mut panel = vec![0.0; d * MAX_LANES];
    // SAFETY: the asserts prove that every row and key lies inside its slice; `panel` holds d x the widest panel.
    unsafe { run(q, rows, k, keys, d, scale, &mut panel, mass) }
}

dispatch! {
    unsafe fn run(q: &[f32], rows: &[Row], k: &[f32], keys: &[usize], d: usize, scale: f32, panel: &mut [f32], mass: &mut [f32]) = panels;
}

const N: usize = 2;

#[inline(always)]
unsafe fn panels<V: Simd, const M: usize>(
    q: &[f32],
    rows: &[Row],
    k: &[f32],
    keys: &[usize],
    d: usize,
    scale: f32,
    panel: &mut [f32],
    mass: &mut [f32],
) {
    let lanes = N * V::LANES;
    for (i, (keys, mass)) in keys.chunks(lanes).zip(mass.chunks_mut(lanes)).enumerate() {
        // Exponentials are powers of two here, so the factor log2 e joins the scale.
        for (lane, &at) in keys.iter().enumerate() {
            for (j, x) in k[at..at + d].iter().enumerate() {
                panel[j * lanes + lane] = x * (scale * std::f32::consts::LOG2_E);
            }
        }
        let first_key = i * lanes;
        let begin = rows.partition_point(|row| row.end_key <= first_key);
        let end = rows.partition_point(|row| row.first_key < first_key + keys.len());
        let mut sums = [0.0; MAX_LANES];
        // SAFETY: the caller's contract; lanes without a key hold what an earlier panel left, and their sums
        // are dropped.
        unsafe { sum_rows::<V, M>(q, &rows[begin..end.max(begin)], first_key, d, panel.as_ptr(), &mut sums) };
        mass.iter_mut().zip(sums).for_each(|(mass, sum)| *mass += sum);
    }
}

#[inline(always)]
unsafe fn sum_rows<V: Simd, const M: usize>(
    q: &[f32],
    rows: &[Row],
    first_key: usize,
    d: usize,
    panel: *const f32,
    sums: &mut [f32; MAX_LANES],
) {
    let lanes = N * V::LANES;
    // SAFETY: the caller's contract: rows lie inside `q`, `panel` is [d, lanes], and N x LANES <= MAX_LANES.
    unsafe {
        let mut total = [V::splat(0.0); N];
        let (blocks, rest) = rows.as_chunks::<M>();
        for block in blocks {
            let logits = dots::<V, M>(std::array::from_fn(|m| q.as_ptr().wrapping_add(block[m].at)), d, panel);
            for m in 0..M {
                add_row(&block[m], first_key, lanes, logits[m], &mut total);
            }
        }
        for row in rest {
            let [logits] = dots::<V, 1>([q.as_ptr().wrapping_add(row.at)], d, panel);
            add_row(row, first_key, lanes, logits, &mut total);
        }
        for n in 0..N {
            total[n].store(sums.as_mut_ptr().wrapping_add(n * V::LANES));
        }
    }
}

/// Inner products of `M` rows with the lanes of `panel [d, lanes]`.
#[inline(always)]
unsafe fn dots<V: Simd, const M: usize>(rows: [*const f32; M], d: usize, panel: *const f32) -> [[V; N]; M] {
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = [[V::splat(0.0); N]; M];
        for i in 0..d {
            let keys: [V; N] = std::array::from_fn(|n| V::load(panel.wrapping_add((i * N + n) * V::LANES)));
            for m in 0..M {
                let x = V::splat(rows[m].wrapping_add(i).read());
                for n in 0..N {
                    acc[m][n] = x.mul_add(keys[n], acc[m][n]);
                }
            }
        }
        acc
    }
}

/// Add the weights of a row's keys to the lanes of `total`.
#[inline(always)]
unsafe fn add_row<V: Simd>(row: &Row, first_key: usize, lanes: usize, logits: [V; N], total: &mut [V; N]) {
    // Zeros between two stretches of -inf: read from the right place, it hides the lanes that do not count.
    const HIDE: f32 = f32::NEG_INFINITY;
    static BEFORE: [f32; 2 * MAX_LANES] = {
        let mut mask = [0.0; 2 * MAX_LANES];
        let mut i = 0;
        while i < MAX_LANES {
            mask[i] = HIDE;
            i += 1;
        }
        mask
    };
    static AFTER: [f32; 2 * MAX_LANES] = {
        let mut mask = [0.0; 2 * MAX_LANES];
        let mut i = MAX_LANES;
        while i < 2 * MAX_LANES {
            mask[i] = HIDE;
            i += 1;
        }
        mask
    };
    let hidden_before = row.first_key.saturating_sub(first_key).min(lanes);
    let shown = (row.end_key.max(first_key) - first_key).min(lanes);
    // SAFETY: the caller's contract; both offsets lie in 0..=MAX_LANES and a panel has at most MAX_LANES lanes.
    unsafe {
        let (shift, weight) = (V::splat(row.lse * std::f32::consts::LOG2_E), V::splat(row.weight));
        for n in 0..N {
            let mut z = logits[n].sub(shift);
            if hidden_before > 0 || shown < lanes {
                z = z.add(V::load(BEFORE.as_ptr().wrapping_add(MAX_LANES - hidden_before + n * V::LANES)));
                z = z.add(V::load(AFTER.as_ptr().wrapping_add(MAX_LANES - shown + n * V::LANES)));
            }
            total[n] = weight.mul_add(z.exp2(), total[n]);
        }
    }
}
