//! The two products of attention for a few queries of one KV head, [`ROWS`] cached rows or [`ROWS`] columns at a time.
//!
//! Each accumulator belongs to one query and one lane, and takes its products in the order of `d`, or of the rows. How many
//! queries share the loads depends on the machine's registers and changes no bit. When there are many, a chunk is widened
//! to f32 once for all of them: widening is otherwise half the work of a product.

use super::{Head, Query, ROWS};
use crate::simd::{Simd, dispatch};

/// Queries at once at most: those of 32 tokens where three heads share a KV head. Their logits are in the L2 cache.
pub(super) const QUERIES: usize = 96;

/// More queries than this read a widened chunk.
const FEW: usize = 4;

dispatch! {
    /// `z[i, row] = q_i . k_row` for all rows of the first `slots` chunks of slots and of the strip's chunks after them.
    ///
    /// # Safety
    /// `head` has the sizes of its shape, `q` holds `D` numbers at each query, `z` has room for `[n, chunks * ROWS]`,
    /// `wide` for `[D, ROWS]`.
    pub(super) unsafe fn logits(
        head: &Head<'_>,
        q: *const f32,
        queries: &[Query],
        slots: usize,
        chunks: usize,
        z: *mut f32,
        wide: *mut f32,
    ) = logits_body;

    /// `sums[i] = sum over rows of p[i, row] v_row`.
    ///
    /// # Safety
    /// As [`logits`]; `sums` has room for `[n, value_width]`, `wide` for `[ROWS, value_width]`.
    pub(super) unsafe fn outputs(
        head: &Head<'_>,
        p: *const f32,
        queries: &[Query],
        slots: usize,
        chunks: usize,
        sums: *mut f32,
        wide: *mut f32,
    ) = outputs_body;
}

/// First row of a chunk in the cache.
#[inline(always)]
fn chunk_row(head: &Head<'_>, slots: usize, chunk: usize) -> usize {
    if chunk < slots { chunk * ROWS } else { head.shape.strip_row() + (chunk - slots) * ROWS }
}

/// Call `$run::<V, R, N, W>(.., at, first)` until every query has had all [`ROWS`] lanes: `R` queries from `first` on and the `N` vectors
/// from lane `at` on, as many as the registers hold. `W` tells whether the vectors come widened.
macro_rules! by_registers {
    ($V:ident, $W:literal, $n:expr, $run:ident($($arg:expr),*)) => {{
        let mut first = 0;
        while first < $n {
            let left = $n - first;
            if $V::LANES == 16 {
                match left {
                    8.. => { $run::<$V, 8, 2, $W>($($arg,)* 0, first); first += 8 }
                    4.. => { $run::<$V, 4, 2, $W>($($arg,)* 0, first); first += 4 }
                    3 => { $run::<$V, 3, 2, $W>($($arg,)* 0, first); first += 3 }
                    2 => { $run::<$V, 2, 2, $W>($($arg,)* 0, first); first += 2 }
                    _ => { $run::<$V, 1, 2, $W>($($arg,)* 0, first); first += 1 }
                }
            } else if $V::LANES == 8 {
                match left {
                    6.. => {
                        $run::<$V, 6, 2, $W>($($arg,)* 0, first);
                        $run::<$V, 6, 2, $W>($($arg,)* 16, first);
                        first += 6
                    }
                    3.. => { $run::<$V, 3, 4, $W>($($arg,)* 0, first); first += 3 }
                    2 => { $run::<$V, 2, 4, $W>($($arg,)* 0, first); first += 2 }
                    _ => { $run::<$V, 1, 4, $W>($($arg,)* 0, first); first += 1 }
                }
            } else {
                match left {
                    3.. => { $run::<$V, 3, 8, $W>($($arg,)* 0, first); first += 3 }
                    2 => { $run::<$V, 2, 8, $W>($($arg,)* 0, first); first += 2 }
                    _ => { $run::<$V, 1, 8, $W>($($arg,)* 0, first); first += 1 }
                }
            }
        }
    }};
}

#[inline(always)]
unsafe fn logits_body<V: Simd, const M: usize>(
    head: &Head<'_>,
    q: *const f32,
    queries: &[Query],
    slots: usize,
    chunks: usize,
    z: *mut f32,
    wide: *mut f32,
) {
    let (d, rows) = (head.shape.head_dim, head.shape.rows());
    for chunk in 0..chunks {
        let keys = head.keys.as_ptr().wrapping_add(chunk_row(head, slots, chunk));
        let z = z.wrapping_add(chunk * ROWS);
        // SAFETY: the caller's contract.
        unsafe {
            if queries.len() > FEW {
                widen::<V>(keys, rows, d, ROWS, wide);
                by_registers!(
                    V,
                    true,
                    queries.len(),
                    chunk_logits(Source { half: keys, wide, step: ROWS }, d, q, queries, z, chunks * ROWS)
                )
            } else {
                by_registers!(
                    V,
                    false,
                    queries.len(),
                    chunk_logits(Source { half: keys, wide, step: rows }, d, q, queries, z, chunks * ROWS)
                )
            }
        }
    }
}

/// Rows of [`ROWS`] numbers or more, `step` apart: in f16, or widened to f32.
#[derive(Clone, Copy)]
struct Source {
    half: *const u16,
    wide: *const f32,
    step: usize,
}

impl Source {
    /// `N` vectors from column `at` of row `row` on; `W` says which of the two is there.
    ///
    /// # Safety
    /// The row has so many numbers.
    #[inline(always)]
    unsafe fn load<V: Simd, const N: usize, const W: bool>(self, row: usize, at: usize) -> [V; N] {
        let place = row * self.step + at;
        // SAFETY: the caller's contract.
        unsafe {
            let mut x = [V::splat(0.0); N];
            for n in 0..N {
                let place = place + n * V::LANES;
                x[n] = if W { V::load(self.wide.wrapping_add(place)) } else { V::load_f16(self.half.wrapping_add(place)) };
            }
            x
        }
    }
}

/// `n` rows of `width` f16 numbers, a multiple of [`ROWS`], that are `step` apart, as f32 without gaps.
///
/// # Safety
/// Both sides have so many numbers.
#[inline(always)]
unsafe fn widen<V: Simd>(from: *const u16, step: usize, n: usize, width: usize, to: *mut f32) {
    for row in 0..n {
        for column in (0..width).step_by(V::LANES) {
            // SAFETY: the caller's contract.
            unsafe { V::load_f16(from.wrapping_add(row * step + column)).store(to.wrapping_add(row * width + column)) };
        }
    }
}

/// `R` queries from `first` on and `N` vectors from row `at` on of one chunk of keys `[D, ROWS]`.
///
/// # Safety
/// As [`logits`].
#[inline(always)]
unsafe fn chunk_logits<V: Simd, const R: usize, const N: usize, const W: bool>(
    keys: Source,
    head_dim: usize,
    q: *const f32,
    queries: &[Query],
    z: *mut f32,
    stride: usize,
    at: usize,
    first: usize,
) {
    // SAFETY: the caller's contract; `N` vectors from `at` on are within ROWS lanes.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; R];
        let mut from = [q; R];
        for r in 0..R {
            from[r] = q.wrapping_add(queries[first + r].q);
        }
        for d in 0..head_dim {
            let k = keys.load::<V, N, W>(d, at);
            for r in 0..R {
                let q = V::broadcast(from[r].wrapping_add(d));
                for n in 0..N {
                    sums[r][n] = q.mul_add(k[n], sums[r][n]);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                sums[r][n].store(z.wrapping_add((first + r) * stride + at + n * V::LANES));
            }
        }
    }
}

#[inline(always)]
unsafe fn outputs_body<V: Simd, const M: usize>(
    head: &Head<'_>,
    p: *const f32,
    queries: &[Query],
    slots: usize,
    chunks: usize,
    sums: *mut f32,
    wide: *mut f32,
) {
    let (width, stride, n) = (head.shape.value_width(), chunks * ROWS, queries.len());
    // SAFETY: `[n, value_width]` numbers, the caller's contract.
    unsafe { sums.write_bytes(0, n * width) };
    for chunk in 0..chunks {
        let values = head.values.as_ptr().wrapping_add(chunk_row(head, slots, chunk) * width);
        let (values, p) = (Source { half: values, wide, step: width }, p.wrapping_add(chunk * ROWS));
        // SAFETY: the caller's contract.
        unsafe {
            if n > FEW {
                widen::<V>(values.half, width, ROWS, width, wide);
            }
            for column in (0..head.shape.head_dim).step_by(ROWS) {
                let sums = sums.wrapping_add(column);
                if n > FEW {
                    by_registers!(V, true, n, add_values(values, column, p, stride, sums, width))
                } else {
                    by_registers!(V, false, n, add_values(values, column, p, stride, sums, width))
                }
            }
        }
    }
}

/// `R` queries from `first` on and `N` vectors from column `column + at` on of one chunk of values `[ROWS, width]`.
///
/// # Safety
/// As [`outputs`].
#[inline(always)]
unsafe fn add_values<V: Simd, const R: usize, const N: usize, const W: bool>(
    values: Source,
    column: usize,
    p: *const f32,
    stride: usize,
    sums: *mut f32,
    width: usize,
    at: usize,
    first: usize,
) {
    let (column, sums) = (column + at, sums.wrapping_add(at));
    // SAFETY: the caller's contract; `N` vectors from `at` on are within ROWS lanes, and value rows are padded to a multiple of them.
    unsafe {
        let mut now = [[V::splat(0.0); N]; R];
        for r in 0..R {
            now[r] = V::load_array(sums.wrapping_add((first + r) * width));
        }
        for row in 0..ROWS {
            let v = values.load::<V, N, W>(row, column);
            for r in 0..R {
                let p = V::broadcast(p.wrapping_add((first + r) * stride + row));
                for n in 0..N {
                    now[r][n] = p.mul_add(v[n], now[r][n]);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                now[r][n].store(sums.wrapping_add((first + r) * width + n * V::LANES));
            }
        }
    }
}
