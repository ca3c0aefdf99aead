//! The two products of attention for a few queries of one KV head, [`ROWS`] cached rows or [`ROWS`] columns at a time.
//!
//! Each accumulator belongs to one query and one lane, and takes its products in the order of `d`, or of the rows. How many
//! queries share the loads depends on the machine's registers and changes no bit.

use super::{Head, Query, ROWS};
use crate::simd::{Simd, dispatch};

/// Queries of one call at most.
pub(super) const QUERIES: usize = 8;

dispatch! {
    /// `z[i, row] = q_i . k_row` for all rows of the first `slots` chunks of slots and of the strip's chunks after them.
    ///
    /// # Safety
    /// `head` has the sizes of its shape, `q` holds `D` numbers at each query, `z` has room for `[n, chunks * ROWS]`.
    pub(super) unsafe fn logits(head: &Head<'_>, q: *const f32, queries: &[Query], slots: usize, chunks: usize, z: *mut f32) = logits_body;

    /// `o_i = inverse_sums[i] sum over rows of p[i, row] v_row`.
    ///
    /// # Safety
    /// As [`logits`]; `o` has room for `D` numbers at each query.
    pub(super) unsafe fn outputs(
        head: &Head<'_>,
        p: *const f32,
        queries: &[Query],
        slots: usize,
        chunks: usize,
        inverse_sums: &[f32; QUERIES],
        o: *mut f32,
    ) = outputs_body;
}

/// First row of a chunk in the cache.
#[inline(always)]
fn chunk_row(head: &Head<'_>, slots: usize, chunk: usize) -> usize {
    if chunk < slots { chunk * ROWS } else { head.shape.strip_row() + (chunk - slots) * ROWS }
}

/// Call `$run::<V, R, N>` with as many queries `R` as three quarters of the registers hold; `N` vectors are [`ROWS`] lanes.
macro_rules! by_registers {
    ($V:ident, $n:expr, $run:ident($($arg:expr),*)) => {{
        let mut first = 0;
        while first < $n {
            let left = $n - first;
            if $V::LANES == 16 {
                match left {
                    8.. => { $run::<$V, 8, 2>($($arg,)* first); first += 8 }
                    4.. => { $run::<$V, 4, 2>($($arg,)* first); first += 4 }
                    3 => { $run::<$V, 3, 2>($($arg,)* first); first += 3 }
                    2 => { $run::<$V, 2, 2>($($arg,)* first); first += 2 }
                    _ => { $run::<$V, 1, 2>($($arg,)* first); first += 1 }
                }
            } else if $V::LANES == 8 {
                match left {
                    3.. => { $run::<$V, 3, 4>($($arg,)* first); first += 3 }
                    2 => { $run::<$V, 2, 4>($($arg,)* first); first += 2 }
                    _ => { $run::<$V, 1, 4>($($arg,)* first); first += 1 }
                }
            } else {
                match left {
                    3.. => { $run::<$V, 3, 8>($($arg,)* first); first += 3 }
                    2 => { $run::<$V, 2, 8>($($arg,)* first); first += 2 }
                    _ => { $run::<$V, 1, 8>($($arg,)* first); first += 1 }
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
) {
    for chunk in 0..chunks {
        // SAFETY: the caller's contract.
        unsafe {
            by_registers!(
                V,
                queries.len(),
                chunk_logits(head, q, queries, chunk_row(head, slots, chunk), z.wrapping_add(chunk * ROWS), chunks * ROWS)
            )
        }
    }
}

/// `R` queries from `first` on and the `N` vectors of keys from `row` on.
#[inline(always)]
unsafe fn chunk_logits<V: Simd, const R: usize, const N: usize>(
    head: &Head<'_>,
    q: *const f32,
    queries: &[Query],
    row: usize,
    z: *mut f32,
    stride: usize,
    first: usize,
) {
    // SAFETY: the caller's contract; `N` vectors are ROWS lanes, and `row` begins a whole chunk.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; R];
        let mut from = [q; R];
        for r in 0..R {
            from[r] = q.wrapping_add(queries[first + r].q);
        }
        let mut keys = head.keys.as_ptr().wrapping_add(row);
        for d in 0..head.shape.head_dim {
            let mut k = [V::splat(0.0); N];
            for n in 0..N {
                k[n] = V::load_f16(keys.wrapping_add(n * V::LANES));
            }
            for r in 0..R {
                let q = V::broadcast(from[r].wrapping_add(d));
                for n in 0..N {
                    sums[r][n] = q.mul_add(k[n], sums[r][n]);
                }
            }
            keys = keys.wrapping_add(head.shape.rows());
        }
        for r in 0..R {
            for n in 0..N {
                sums[r][n].store(z.wrapping_add((first + r) * stride + n * V::LANES));
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
    inverse_sums: &[f32; QUERIES],
    o: *mut f32,
) {
    for column in (0..head.shape.head_dim).step_by(ROWS) {
        // SAFETY: the caller's contract.
        unsafe { by_registers!(V, queries.len(), column_outputs(head, p, queries, slots, chunks, column, inverse_sums, o)) }
    }
}

/// `R` queries from `first` on and the `N` vectors of columns from `column` on.
#[inline(always)]
unsafe fn column_outputs<V: Simd, const R: usize, const N: usize>(
    head: &Head<'_>,
    p: *const f32,
    queries: &[Query],
    slots: usize,
    chunks: usize,
    column: usize,
    inverse_sums: &[f32; QUERIES],
    o: *mut f32,
    first: usize,
) {
    let (width, stride) = (head.shape.value_width(), chunks * ROWS);
    // SAFETY: the caller's contract; `N` vectors are ROWS lanes, and value rows are padded to a multiple of them.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; R];
        for chunk in 0..chunks {
            let mut values = head.values.as_ptr().wrapping_add(chunk_row(head, slots, chunk) * width + column);
            let p = p.wrapping_add(first * stride + chunk * ROWS);
            for row in 0..ROWS {
                let mut v = [V::splat(0.0); N];
                for n in 0..N {
                    v[n] = V::load_f16(values.wrapping_add(n * V::LANES));
                }
                for r in 0..R {
                    let p = V::broadcast(p.wrapping_add(r * stride + row));
                    for n in 0..N {
                        sums[r][n] = p.mul_add(v[n], sums[r][n]);
                    }
                }
                values = values.wrapping_add(width);
            }
        }
        let columns = (head.shape.head_dim - column).min(ROWS);
        for r in 0..R {
            let inverse = V::splat(inverse_sums[first + r]);
            let mut results = [0.0f32; ROWS];
            for n in 0..N {
                sums[r][n].mul(inverse).store(results.as_mut_ptr().wrapping_add(n * V::LANES));
            }
            std::ptr::copy_nonoverlapping(results.as_ptr(), o.wrapping_add(queries[first + r].o + column), columns);
        }
    }
}
