//! The specification, in f64: gathers what a query sees and takes one softmax over it.

use half::f16;

use super::{Head, Query};

/// `o [D]` of one query.
pub fn attend(head: &Head<'_>, q: &[f32], query: Query) -> Vec<f64> {
    let shape = head.shape;
    let d = shape.head_dim;
    let number = |bits: u16| f16::from_bits(bits).to_f64();
    let seen = (0..head.n_slots).chain(shape.strip_row()..shape.strip_row() + query.n_strip);
    let logits: Vec<(usize, f64)> = seen
        .map(|row| {
            let dot: f64 = (0..d).map(|i| q[query.q + i] as f64 * number(head.keys[i * shape.rows() + row])).sum();
            let bias = head.bias.map_or(0.0, |bias| bias.get(row).map_or(0.0, |&b| b as f64));
            (row, dot / (d as f64).sqrt() + bias)
        })
        .collect();
    let largest = logits.iter().map(|z| z.1).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|z| (z.1 - largest).exp()).sum();
    let weighted =
        |i: usize| logits.iter().map(|&(row, z)| (z - largest).exp() / sum * number(head.values[row * shape.value_width() + i])).sum();
    (0..d).map(weighted).collect()
}
