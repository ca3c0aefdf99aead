//! Activations rounded to int8, one row per token.

use super::{Form, GROUPS, Layout};
use crate::vector_math::vectorised;

/// Room for the int8 form of `capacity` rows of `cols` numbers, allocated once and filled again and again.
///
/// A row is one run of words: its int8 values in the [`Form`] that the inner loop wants, then per group the bits of its f32 scale, then per group
/// `-128 sum aq`, which takes back the 128 that every stored weight has too much.
pub struct QuantisedRows {
    cols: usize,
    group: usize,
    form: Form,
    capacity: usize,
    words: Vec<i32>,
}

impl QuantisedRows {
    /// Panics for a group that is not one of [`GROUPS`].
    #[track_caller]
    pub fn new(capacity: usize, cols: usize, group: usize, form: Form) -> Self {
        assert!(cols > 0 && GROUPS.contains(&group), "int8 activations of {cols} in groups of {group}");
        Self { cols, group, form, capacity, words: vec![0; capacity * row_words(cols, group, form)] }
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
        row_words(self.cols, self.group, self.form)
    }

    /// Form of the values.
    pub fn form(&self) -> Form {
        self.form
    }

    /// The words of all rows, for [`Self::quantise`].
    pub fn words_mut(&mut self) -> &mut [i32] {
        &mut self.words
    }

    /// Quantise `x [K]` as row `row`.
    #[track_caller]
    pub fn set_row(&mut self, row: usize, x: &[f32]) {
        let n = self.row_words();
        Self::quantise(x, self.group, self.form, &mut self.words[row * n..(row + 1) * n]);
    }

    /// Quantise `x [K]` into the words of one row.
    #[track_caller]
    pub fn quantise(x: &[f32], group: usize, form: Form, row: &mut [i32]) {
        assert_eq!(row.len(), row_words(x.len(), group, form), "a quantised row of {} numbers", x.len());
        quantise_row(x, group, form, row);
    }

    /// The words of some rows.
    pub(super) fn rows(&self, rows: std::ops::Range<usize>) -> &[i32] {
        let n = self.row_words();
        &self.words[rows.start * n..rows.end * n]
    }
}

fn row_words(cols: usize, group: usize, form: Form) -> usize {
    let layout = Layout::new(1, cols, group);
    value_words(&layout, form) + 2 * layout.n_groups()
}

/// Words of a row's values.
fn value_words(layout: &Layout, form: Form) -> usize {
    match form {
        Form::Bytes => layout.padded_cols() / 4,
        Form::Pairs => layout.padded_cols() / 2,
    }
}

/// Parts of a row's words: int8 values in words, scales as bits, surpluses.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) values: &'a [i32],
    pub(super) scales: &'a [i32],
    pub(super) surplus: &'a [i32],
}

impl<'a> Row<'a> {
    /// Take the words of one row apart.
    pub(super) fn of(words: &'a [i32], layout: &Layout, form: Form) -> Self {
        let (values, rest) = words.split_at(value_words(layout, form));
        let (scales, surplus) = rest.split_at(layout.n_groups());
        Self { values, scales, surplus }
    }

    /// Four values that follow each other, whatever the form.
    pub(super) fn four(&self, index: usize, form: Form) -> [i32; 4] {
        match form {
            Form::Bytes => self.values[index].to_ne_bytes().map(|byte| byte as i8 as i32),
            Form::Pairs => {
                let pairs: &[i16] = bytemuck::cast_slice(&self.values[2 * index..2 * index + 2]);
                [pairs[0], pairs[2], pairs[1], pairs[3]].map(i32::from)
            }
        }
    }
}

vectorised! {
    fn quantise_row(x: &[f32], group: usize, form: Form, row: &mut [i32]) {
        let n_groups = x.len().div_ceil(group);
        let group_words = if form == Form::Bytes { group / 4 } else { group / 2 };
        let (values, rest) = row.split_at_mut(n_groups * group_words);
        let (scales, surplus) = rest.split_at_mut(n_groups);
        for (g, (x, values)) in x.chunks(group).zip(values.chunks_exact_mut(group_words)).enumerate() {
            // `x * 0` is 0 for every number and NaN for what is not one.
            let (mut lanes, mut probe) = ([0.0f32; 16], [0.0f32; 16]);
            let (blocks, rest) = x.as_chunks::<16>();
            for block in blocks {
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
            for x in rest {
                largest = if x.abs() > largest { x.abs() } else { largest };
                finite += x * 0.0;
            }
            // What is not finite would end as silent nonsense; as a NaN scale it reaches the logits and is seen.
            let scale = if finite == 0.0 { largest / 127.0 } else { f32::NAN };
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let inverse = if inverse <= f32::MAX { inverse } else { 0.0 };
            let mut sum = 0i32;
            let mut rounded = [0i16; 64]; // the largest group
            for (v, x) in rounded.iter_mut().zip(x) {
                // Adding and subtracting 1.5 * 2^23 rounds to nearest, ties to even.
                let q = (x * inverse + 12_582_912.0) - 12_582_912.0;
                let q = if q > 127.0 { 127.0 } else { q };
                let q = if q < -127.0 { -127.0 } else { q };
                let q = q as i32;
                *v = q as i16;
                sum += q;
            }
            if form == Form::Bytes {
                let bytes: &mut [i8] = bytemuck::cast_slice_mut(values);
                for (byte, v) in bytes.iter_mut().zip(&rounded) {
                    *byte = *v as i8;
                }
            } else {
                let pairs: &mut [i16] = bytemuck::cast_slice_mut(values);
                for (pair, v) in pairs.as_chunks_mut::<4>().0.iter_mut().zip(rounded.as_chunks::<4>().0) {
                    *pair = [v[0], v[2], v[1], v[3]];
                }
            }
            scales[g] = scale.to_bits() as i32;
            surplus[g] = -128 * sum;
        }
    }
}
