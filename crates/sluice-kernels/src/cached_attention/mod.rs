//! Attention over the bounded cache of one sequence, one KV head at a time, keys and values in f16.
//!
//! ```text
//! z_j = q . k_j / sqrt(D) + beta_j      j in the slots in use and in the part of the strip that the query sees
//! a   = softmax_j z_j                   o = sum_j a_j v_j
//! ```
//!
//! A head's rows are its `top_k` slots of admitted keys, then the strip of recent ones; both begin at a multiple of
//! [`ROWS`]. Keys are stored transposed, `[D, rows]`, so that the lanes of a vector are keys and no sum crosses them.
//! Every sum runs in one order that depends on the rows alone: a query has the same bits alone and in a block of
//! queries, with AVX-512, AVX2 and NEON (without a fused multiply-add, on older machines, the last bits differ).

pub mod naive;
#[cfg(test)]
mod tests;
mod tile;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::vector_math;

/// Rows that a loop takes at once; slots and strip are padded to a multiple of it.
pub const ROWS: usize = 32;

/// Sizes of a head's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// `D`.
    pub head_dim: usize,
    /// Slots for admitted keys.
    pub top_k: usize,
    /// Rows of the strip, `window + route_every - 1`.
    pub strip: usize,
}

impl HeadShape {
    /// First row of the strip.
    pub fn strip_row(&self) -> usize {
        self.top_k.next_multiple_of(ROWS)
    }

    /// Rows, padding included.
    pub fn rows(&self) -> usize {
        self.strip_row() + self.strip.next_multiple_of(ROWS)
    }

    /// Width of a value row, padding included.
    pub fn value_width(&self) -> usize {
        self.head_dim.next_multiple_of(ROWS)
    }

    /// Numbers of a head's keys, `[D, rows]`.
    pub fn key_len(&self) -> usize {
        self.head_dim * self.rows()
    }

    /// Numbers of a head's values, `[rows, value_width]`.
    pub fn value_len(&self) -> usize {
        self.rows() * self.value_width()
    }

    /// Numbers of scratch for each call of [`attend`] with `n` queries that runs at the same time.
    pub fn scratch_len(&self, n: usize) -> usize {
        n.min(tile::QUERIES) * (self.rows() + self.value_width()) + ROWS * self.value_width()
    }
}

/// Cached keys and values of one KV head. Padding and free rows hold finite numbers.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// Sizes.
    pub shape: HeadShape,
    /// `[D, rows]`, bits of f16.
    pub keys: &'a [u16],
    /// `[rows, value_width]`, bits of f16.
    pub values: &'a [u16],
    /// Slots in use: rows `0..n_slots`.
    pub n_slots: usize,
    /// What a slot's key adds to its logit: `[n_slots]`, or none.
    pub bias: Option<&'a [f32]>,
}

/// One query head at one position.
#[derive(Clone, Copy)]
pub struct Query {
    /// Where its `D` numbers begin in `q`.
    pub q: usize,
    /// Where its result begins in `o`.
    pub o: usize,
    /// Rows of the strip that it sees.
    pub n_strip: usize,
}

/// Attention of the queries `queries(0) .. queries(n)` of one KV head: `D` numbers of `o` each, from `D` numbers of `q`.
///
/// `scratch` has at least [`HeadShape::scratch_len`] numbers for `n`. Each query sees at least one row.
#[track_caller]
pub fn attend(head: &Head<'_>, q: &[f32], n: usize, queries: impl Fn(usize) -> Query, o: &mut [f32], scratch: &mut [f32]) {
    let shape = head.shape;
    assert!(
        head.keys.len() == shape.key_len() && head.values.len() == shape.value_len() && head.n_slots <= shape.top_k,
        "cached_attention: {} keys, {} values and {} slots for {shape:?}",
        head.keys.len(),
        head.values.len(),
        head.n_slots
    );
    assert!(head.bias.is_none_or(|bias| bias.len() == head.n_slots), "cached_attention: biases of {} slots", head.n_slots);
    let at_once = n.min(tile::QUERIES);
    let (z, rest) = scratch[..shape.scratch_len(n)].split_at_mut(at_once * shape.rows());
    let (sums, wide) = rest.split_at_mut(at_once * shape.value_width());
    let scale = 1.0 / (shape.head_dim as f32).sqrt();
    let mut first = 0;
    while first < n {
        let count = (n - first).min(tile::QUERIES);
        let mut set = [Query { q: 0, o: 0, n_strip: 0 }; tile::QUERIES];
        let mut seen = 0;
        for (i, query) in set[..count].iter_mut().enumerate() {
            *query = queries(first + i);
            assert!(
                query.n_strip <= shape.strip && query.n_strip + head.n_slots > 0,
                "cached_attention: a query that sees {} of {} rows of the strip and {} slots",
                query.n_strip,
                shape.strip,
                head.n_slots
            );
            assert!(
                query.q + shape.head_dim <= q.len() && query.o + shape.head_dim <= o.len(),
                "cached_attention: a query at {} of {}, its result at {} of {}",
                query.q,
                q.len(),
                query.o,
                o.len()
            );
            seen = seen.max(query.n_strip);
        }
        let set = &set[..count];
        // The chunks of rows that any of these queries sees: those of the slots, then those of the strip.
        let slots = head.n_slots.div_ceil(ROWS);
        let chunks = slots + seen.div_ceil(ROWS);
        let stride = chunks * ROWS;
        // SAFETY: sizes are checked above; `z` has room for `count` rows of at most `rows` numbers, and values are at least as wide as keys.
        unsafe { tile::logits(head, q.as_ptr(), set, slots, chunks, z.as_mut_ptr(), wide.as_mut_ptr()) };
        let mut inverse_sums = [0.0; tile::QUERIES];
        for (i, query) in set.iter().enumerate() {
            let z = &mut z[i * stride..(i + 1) * stride];
            vector_math::scale(&mut z[..], scale);
            if let Some(bias) = head.bias {
                vector_math::add_assign(&mut z[..head.n_slots], bias);
            }
            z[head.n_slots..slots * ROWS].fill(f32::NEG_INFINITY);
            z[slots * ROWS + query.n_strip..].fill(f32::NEG_INFINITY);
            let largest = vector_math::max(z);
            inverse_sums[i] = 1.0 / vector_math::exp_in_place(z, largest);
        }
        // SAFETY: as above.
        unsafe { tile::outputs(head, z.as_ptr(), set, slots, chunks, sums.as_mut_ptr(), wide.as_mut_ptr()) };
        for ((query, sums), inverse) in set.iter().zip(sums.chunks_exact(shape.value_width())).zip(inverse_sums) {
            let o = &mut o[query.o..query.o + shape.head_dim];
            o.iter_mut().zip(sums).for_each(|(o, sum)| *o = sum * inverse);
        }
        first += count;
    }
}

/// Dimensions of keys that are written together: few enough that their lines stay in the first cache from token to token.
const KEY_DIMS: usize = 16;

/// Write the key and the value `[D]` of each token as a row of a head's cache, from row `first` on.
#[track_caller]
pub fn write_rows<'a>(
    shape: HeadShape,
    keys: &mut [u16],
    values: &mut [u16],
    first: usize,
    tokens: impl Iterator<Item = (&'a [f32], &'a [f32])> + Clone,
) {
    let (d, rows, width) = (shape.head_dim, shape.rows(), shape.value_width());
    for (row, (key, value)) in (first..).zip(tokens.clone()) {
        assert!(row < rows && key.len() == d && value.len() == d, "cached_attention: row {row} of {shape:?}");
        let target: &mut [f16] = bytemuck::cast_slice_mut(&mut values[row * width..][..d]);
        target.convert_from_f32_slice(value);
    }
    let mut halves = [f16::ZERO; KEY_DIMS];
    for (keys, dim) in keys.chunks_mut(KEY_DIMS * rows).zip((0..d).step_by(KEY_DIMS)) {
        let halves = &mut halves[..keys.len() / rows];
        for (row, (key, _)) in (first..).zip(tokens.clone()) {
            halves.convert_from_f32_slice(&key[dim..dim + halves.len()]);
            keys.chunks_exact_mut(rows).zip(&*halves).for_each(|(keys, half)| keys[row] = half.to_bits());
        }
    }
}

/// What happens to a head's rows when some leave the strip.
#[derive(Clone, Copy)]
pub struct Departure<'a> {
    /// Rows of the strip that are copied to a slot, and the slot, one after the other.
    pub admitted: &'a [(u32, u32)],
    /// Rows that leave the strip, the first ones.
    pub n: usize,
    /// Rows behind them, which move to the front.
    pub left: usize,
}

impl Departure<'_> {
    /// Move the keys and values of a head's cache.
    pub fn apply(&self, shape: HeadShape, keys: &mut [u16], values: &mut [u16]) {
        if self.n == 0 {
            return;
        }
        let (rows, width, start) = (shape.rows(), shape.value_width(), shape.strip_row());
        for keys in keys.chunks_exact_mut(rows) {
            for &(row, slot) in self.admitted {
                keys[slot as usize] = keys[start + row as usize];
            }
            keys.copy_within(start + self.n..start + self.n + self.left, start);
        }
        for &(row, slot) in self.admitted {
            let from = (start + row as usize) * width;
            values.copy_within(from..from + width, slot as usize * width);
        }
        values.copy_within((start + self.n) * width..(start + self.n + self.left) * width, start * width);
    }
}
