//! Inner loop for any machine: the order of the vector versions, one tile and token at a time.

use half::f16;

use super::activations::Row;
use super::{TILE_ROWS, Task};

pub(super) fn run(task: &Task<'_>, out: &mut [f32]) {
    let layout = task.weights.layout;
    let words = task.tokens.len() / task.n_tokens;
    let words_per_group = layout.group / 4;
    for tile in task.tiles.clone() {
        let (values, scales) = task.weights.tile(tile);
        for token in 0..task.n_tokens {
            let row = Row::of(&task.tokens[token * words..(token + 1) * words], &layout);
            let mut sums = task.start(tile);
            for g in 0..layout.n_groups() {
                let mut inner = [row.surplus[g]; TILE_ROWS];
                let words = g * words_per_group..(g + 1) * words_per_group;
                for (word, values) in words.zip(values[g * words_per_group * 4 * TILE_ROWS..].as_chunks::<{ 4 * TILE_ROWS }>().0) {
                    let a = row.four(word);
                    for (inner, w) in inner.iter_mut().zip(values.as_chunks::<4>().0) {
                        *inner += w[0] as i32 * a[0] + w[1] as i32 * a[1] + w[2] as i32 * a[2] + w[3] as i32 * a[3];
                    }
                }
                let token_scale = f32::from_bits(row.scales[g] as u32);
                for (lane, (sum, inner)) in sums.iter_mut().zip(inner).enumerate() {
                    let scale = f16::from_bits(scales[g * TILE_ROWS + lane]).to_f32() * token_scale;
                    *sum = (inner as f32).mul_add(scale, *sum);
                }
            }
            task.store(token, tile, &sums, out);
        }
    }
}
