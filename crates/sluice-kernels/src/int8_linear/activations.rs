//! Activations rounded to thirteen bits, one row per token.

use super::{GROUPS, Layout};
use crate::vector_math::vectorised;

/// Largest activation after rounding. Its sums with int8 weights stay exact in f32 over a group of 32, in i32 over any.
///
/// Eight bits would be 127 and are not enough: their noise was most of what int8 cost (LOG.md). On AVX2 a product of sixteen bits costs what one
/// of eight does; VNNI takes two products instead of one, which a single token, waiting for memory, does not feel.
pub const LARGEST: f32 = 4095.0;

/// Room for the rounded form of `capacity` rows of `cols` numbers, allocated once and filled again and again.
///
/// A row is one run of words: its values as sixteen bits each, of four inputs `a b c d` in the order `a c b d`, the partners of the
/// weights' even and odd bytes; then per group the bits of its f32 scale, then per group
/// `-128 sum aq`, which takes back the 128 that every stored weight has too much.
pub struct QuantisedRows {
    cols: usize,
    group: usize,
    capacity: usize,
    words: Vec<i32>,
}

impl QuantisedRows {
    /// Panics for a group that is not one of [`GROUPS`].
    #[track_caller]
    pub fn new(capacity: usize, cols: usize, group: usize) -> Self {
        assert!(cols > 0 && GROUPS.contains(&group), "int8 activations of {cols} in groups of {group}");
        Self { cols, group, capacity, words: vec![0; capacity * row_words(cols, group)] }
    }

    /// Rows that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// `K`.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Inputs that share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Words of one row; rows can be filled in parallel as chunks of this length.
    pub fn row_words(&self) -> usize {
        row_words(self.cols, self.group)
    }

    /// The words of all rows, for [`Self::quantise`].
    pub fn words_mut(&mut self) -> &mut [i32] {
        &mut self.words
    }

    /// Quantise `x [K]` as row `row`.
    #[track_caller]
    pub fn set_row(&mut self, row: usize, x: &[f32]) {
        let n = self.row_words();
        Self::quantise(x, self.group, &mut self.words[row * n..(row + 1) * n]);
    }

    /// Quantise `x [K]` into the words of one row.
    #[track_caller]
    pub fn quantise(x: &[f32], group: usize, row: &mut [i32]) {
        assert_eq!(row.len(), row_words(x.len(), group), "a quantised row of {} numbers", x.len());
        quantise_row(x, group, row);
    }

    /// The words of some rows.
    pub(super) fn rows(&self, rows: std::ops::Range<usize>) -> &[i32] {
        let n = self.row_words();
        &self.words[rows.start * n..rows.end * n]
    }
}

fn row_words(cols: usize, group: usize) -> usize {
    let layout = Layout::new(1, cols, group);
    layout.padded_cols() / 2 + 2 * layout.n_groups()
}

/// Parts of a row's words: values, two words for four of them; scales as bits; surpluses.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) values: &'a [i32],
    pub(super) scales: &'a [i32],
    pub(super) surplus: &'a [i32],
}

impl<'a> Row<'a> {
    /// Take the words of one row apart.
    pub(super) fn of(words: &'a [i32], layout: &Layout) -> Self {
        let (values, rest) = words.split_at(layout.padded_cols() / 2);
        let (scales, surplus) = rest.split_at(layout.n_groups());
        Self { values, scales, surplus }
    }

    /// Four values that follow each other.
    pub(super) fn four(&self, index: usize) -> [i32; 4] {
        let [a, c, b, d] = bytemuck::cast::<[i32; 2], [i16; 4]>([self.values[2 * index], self.values[2 * index + 1]]);
        [a, b, c, d].map(i32::from)
    }
}

/// `1.5 * 2^23`: a number below `2^22` that is added to it is rounded to a whole one, ties to even, and stands in the low bits of the sum.
const ROUNDER: f32 = 12_582_912.0;

vectorised! {
    fn quantise_row(x: &[f32], group: usize, row: &mut [i32]) {
        let n_groups = x.len().div_ceil(group);
        let (values, rest) = row.split_at_mut(n_groups * group / 2);
        let (scales, surplus) = rest.split_at_mut(n_groups);
        for (g, (x, values)) in x.chunks(group).zip(values.chunks_exact_mut(group / 2)).enumerate() {
            let mut padded = [0.0; GROUPS[GROUPS.len() - 1]];
            let x = if x.len() == group {
                x
            } else {
                padded[..x.len()].copy_from_slice(x);
                &padded[..group]
            };
            // `x * 0` is 0 for every number and NaN for what is not one.
            let (mut lanes, mut probe) = ([0.0f32; 16], [0.0f32; 16]);
            for block in x.as_chunks::<16>().0 {
                for i in 0..16 {
                    let a = block[i].abs();
                    lanes[i] = if a > lanes[i] { a } else { lanes[i] };
                    probe[i] += block[i] * 0.0;
                }
            }
            let (mut largest, mut finite) = (0.0f32, 0.0f32);
            for i in 0..16 {
                largest = if lanes[i] > largest { lanes[i] } else { largest };
                finite += probe[i];
            }
            // What is not finite would end as silent nonsense; as a NaN scale it reaches the logits and is seen.
            let scale = if finite == 0.0 { largest / LARGEST } else { f32::NAN };
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let inverse = if inverse <= f32::MAX { inverse } else { 0.0 };
            let mut sums = [0i32; 16];
            for (x, values) in x.as_chunks::<16>().0.iter().zip(values.as_chunks_mut::<8>().0) {
                let mut rounded = [0i32; 16];
                for i in 0..16 {
                    let q = x[i] * inverse;
                    let q = if q > LARGEST { LARGEST } else { q };
                    let q = if q < -LARGEST { -LARGEST } else { q };
                    rounded[i] = (q + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()) as i32;
                    sums[i] = sums[i].wrapping_add(rounded[i]);
                }
                // Of four values a b c d the pairs a c and b d.
                for i in 0..8 {
                    let at = i / 2 * 4 + i % 2;
                    values[i] = (rounded[at] & 0xffff) | (rounded[at + 2] << 16);
                }
            }
            scales[g] = scale.to_bits() as i32;
            surplus[g] = sums.iter().fold(0i32, |sum, &v| sum.wrapping_add(v)).wrapping_mul(-128);
        }
    }
}
