//! The matrix products of a panel, blocked so that the accumulators stay in registers.
//! `N` vectors along the lanes, `M` rows; remainders run with two rows and one.
//!
//! Safety, for all of them: the machine has the instructions of `V`, and the pointers reach the shapes named.

use crate::simd::Simd;

/// `out [n, lanes] = rows . panel`: row `j` starts at `base + at[j]` and has `d` numbers, `panel [d, lanes]`.
///
/// From key `n_plain` on, adds the mask row `mask[j]` of `add`; `lane_at` are the offsets of the panel's
/// vectors in such a row. Updates the running maxima of the lanes.
#[inline(always)]
pub(super) unsafe fn logits<V: Simd, const N: usize, const M: usize>(
    n: usize,
    n_plain: usize,
    base: *const f32,
    at: &[usize],
    mask: &[u32],
    add: *const f32,
    lane_at: &[usize; N],
    d: usize,
    panel: *const f32,
    out: *mut f32,
    max: &mut [V; N],
) {
    let mut j = 0;
    // SAFETY: the caller's contract; every block ends at `n`.
    unsafe {
        while j + M <= n {
            logits_rows::<V, N, M>(j, n_plain, base, at, mask, add, lane_at, d, panel, out, max);
            j += M;
        }
        while j + 2 <= n {
            logits_rows::<V, N, 2>(j, n_plain, base, at, mask, add, lane_at, d, panel, out, max);
            j += 2;
        }
        if j < n {
            logits_rows::<V, N, 1>(j, n_plain, base, at, mask, add, lane_at, d, panel, out, max);
        }
    }
}

/// Rows `j..j + M` of [`logits`].
#[inline(always)]
unsafe fn logits_rows<V: Simd, const N: usize, const M: usize>(
    j: usize,
    n_plain: usize,
    base: *const f32,
    at: &[usize],
    mask: &[u32],
    add: *const f32,
    lane_at: &[usize; N],
    d: usize,
    panel: *const f32,
    out: *mut f32,
    max: &mut [V; N],
) {
    let lanes = N * V::LANES;
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = dots::<V, N, M>(base, &at[j..], d, panel);
        if j + M > n_plain {
            for m in 0..M {
                let row = add.wrapping_add(mask[j + m] as usize * super::QUERIES);
                for i in 0..N {
                    acc[m][i] = acc[m][i].add(V::load(row.wrapping_add(lane_at[i])));
                }
            }
        }
        for m in 0..M {
            for i in 0..N {
                acc[m][i].store(out.wrapping_add((j + m) * lanes + i * V::LANES));
                max[i] = acc[m][i].max(max[i]);
            }
        }
    }
}

/// `out [n, lanes] = rows . panel`, without masks.
#[inline(always)]
pub(super) unsafe fn inner<V: Simd, const N: usize, const M: usize>(
    n: usize,
    base: *const f32,
    at: &[usize],
    d: usize,
    panel: *const f32,
    out: *mut f32,
) {
    let mut j = 0;
    // SAFETY: the caller's contract; every block ends at `n`.
    unsafe {
        while j + M <= n {
            inner_rows::<V, N, M>(j, base, at, d, panel, out);
            j += M;
        }
        while j + 2 <= n {
            inner_rows::<V, N, 2>(j, base, at, d, panel, out);
            j += 2;
        }
        if j < n {
            inner_rows::<V, N, 1>(j, base, at, d, panel, out);
        }
    }
}

/// Rows `j..j + M` of [`inner`].
#[inline(always)]
unsafe fn inner_rows<V: Simd, const N: usize, const M: usize>(
    j: usize,
    base: *const f32,
    at: &[usize],
    d: usize,
    panel: *const f32,
    out: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let acc = dots::<V, N, M>(base, &at[j..], d, panel);
        for m in 0..M {
            for i in 0..N {
                acc[m][i].store(out.wrapping_add(((j + m) * N + i) * V::LANES));
            }
        }
    }
}

/// Inner products of `M` rows of `d` numbers with the lanes of `panel [d, lanes]`.
#[inline(always)]
unsafe fn dots<V: Simd, const N: usize, const M: usize>(base: *const f32, at: &[usize], d: usize, panel: *const f32) -> [[V; N]; M] {
    let mut rows = [base; M];
    for m in 0..M {
        rows[m] = base.wrapping_add(at[m]);
    }
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = [[V::splat(0.0); N]; M];
        for i in 0..d {
            let lanes: [V; N] = V::load_array(panel.wrapping_add(i * N * V::LANES));
            for m in 0..M {
                let x = V::broadcast(rows[m].wrapping_add(i));
                for n in 0..N {
                    acc[m][n] = x.mul_add(lanes[n], acc[m][n]);
                }
            }
        }
        acc
    }
}

/// `out [d, lanes] = keep * out + rows^T . weights`: row `j` of `n` starts at `base + at[j]` and has `d` numbers,
/// `weights [n, lanes]`; `keep` is one number per lane.
#[inline(always)]
pub(super) unsafe fn outer<V: Simd, const N: usize, const M: usize>(
    n: usize,
    base: *const f32,
    at: &[usize],
    d: usize,
    weights: *const f32,
    keep: &[V; N],
    out: *mut f32,
) {
    let mut i = 0;
    while i + M <= d {
        // SAFETY: the caller's contract; `i + M <= d`.
        unsafe { outer_rows::<V, N, M>(n, base.wrapping_add(i), at, weights, keep, out.wrapping_add(i * N * V::LANES)) };
        i += M;
    }
    while i + 2 <= d {
        // SAFETY: the caller's contract; `i + 2 <= d`.
        unsafe { outer_rows::<V, N, 2>(n, base.wrapping_add(i), at, weights, keep, out.wrapping_add(i * N * V::LANES)) };
        i += 2;
    }
    if i < d {
        // SAFETY: the caller's contract; `i < d`.
        unsafe { outer_rows::<V, N, 1>(n, base.wrapping_add(i), at, weights, keep, out.wrapping_add(i * N * V::LANES)) };
    }
}

#[inline(always)]
unsafe fn outer_rows<V: Simd, const N: usize, const M: usize>(
    n: usize,
    base: *const f32,
    at: &[usize],
    weights: *const f32,
    keep: &[V; N],
    out: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = [[V::splat(0.0); N]; M];
        for (j, &at) in at[..n].iter().enumerate() {
            let row = base.wrapping_add(at);
            let lanes: [V; N] = V::load_array(weights.wrapping_add(j * N * V::LANES));
            for m in 0..M {
                let x = V::broadcast(row.wrapping_add(m));
                for i in 0..N {
                    acc[m][i] = x.mul_add(lanes[i], acc[m][i]);
                }
            }
        }
        for m in 0..M {
            for i in 0..N {
                let to = out.wrapping_add((m * N + i) * V::LANES);
                V::load(to).mul_add(keep[i], acc[m][i]).store(to);
            }
        }
    }
}

/// Row `to[j]` of `out += weights [n, lanes] . rows [lanes, width]`, both products of a backward step.
/// Rows of `out` and `rows` have `width` numbers, a multiple of 16.
#[inline(always)]
pub(super) unsafe fn scatter<V: Simd, const M: usize>(
    n: usize,
    lanes: usize,
    weights: *const f32,
    rows: *const f32,
    width: usize,
    out: *mut f32,
    to: &[u32],
) {
    let mut j = 0;
    while j + M <= n {
        // SAFETY: the caller's contract; `j + M <= n`.
        unsafe { scatter_rows::<V, M>(lanes, weights.wrapping_add(j * lanes), rows, width, out, &to[j..]) };
        j += M;
    }
    while j + 2 <= n {
        // SAFETY: the caller's contract; `j + 2 <= n`.
        unsafe { scatter_rows::<V, 2>(lanes, weights.wrapping_add(j * lanes), rows, width, out, &to[j..]) };
        j += 2;
    }
    if j < n {
        // SAFETY: the caller's contract; `j < n`.
        unsafe { scatter_rows::<V, 1>(lanes, weights.wrapping_add(j * lanes), rows, width, out, &to[j..]) };
    }
}

#[inline(always)]
unsafe fn scatter_rows<V: Simd, const M: usize>(
    lanes: usize,
    weights: *const f32,
    rows: *const f32,
    width: usize,
    out: *mut f32,
    to: &[u32],
) {
    let mut rows_of_out = [out; M];
    for m in 0..M {
        rows_of_out[m] = out.wrapping_add(to[m] as usize * width);
    }
    let mut i = 0;
    while i + 2 * V::LANES <= width {
        // SAFETY: the caller's contract; two vectors fit at `i`.
        unsafe { scatter_block::<V, 2, M>(lanes, weights, rows.wrapping_add(i), width, &rows_of_out, i) };
        i += 2 * V::LANES;
    }
    while i < width {
        // SAFETY: the caller's contract; `width` is a multiple of the lanes.
        unsafe { scatter_block::<V, 1, M>(lanes, weights, rows.wrapping_add(i), width, &rows_of_out, i) };
        i += V::LANES;
    }
}

#[inline(always)]
unsafe fn scatter_block<V: Simd, const N: usize, const M: usize>(
    lanes: usize,
    weights: *const f32,
    rows: *const f32,
    width: usize,
    to: &[*mut f32; M],
    column: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = [[V::splat(0.0); N]; M];
        for l in 0..lanes {
            let row: [V; N] = V::load_array(rows.wrapping_add(l * width));
            for m in 0..M {
                let x = V::broadcast(weights.wrapping_add(m * lanes + l));
                for n in 0..N {
                    acc[m][n] = x.mul_add(row[n], acc[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                let to = to[m].wrapping_add(column + n * V::LANES);
                V::load(to).add(acc[m][n]).store(to);
            }
        }
    }
}

/// Inner product of two rows of `d` numbers.
#[inline(always)]
pub(super) unsafe fn dot<V: Simd>(a: *const f32, b: *const f32, d: usize) -> f32 {
    let whole = d / V::LANES * V::LANES;
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = V::splat(0.0);
        for i in (0..whole).step_by(V::LANES) {
            acc = V::load(a.wrapping_add(i)).mul_add(V::load(b.wrapping_add(i)), acc);
        }
        let mut sum = acc.sum();
        for i in whole..d {
            sum += *a.wrapping_add(i) * *b.wrapping_add(i);
        }
        sum
    }
}
