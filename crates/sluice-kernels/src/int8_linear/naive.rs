//! The specification: unpacks both operands and follows the formula of the module word by word.

use half::f16;

use super::activations::Row;
use super::{Layout, PackedMatrix, QuantisedRows, TILE_ROWS};

/// `y [T, N]`.
#[cfg_attr(not(test), expect(dead_code, reason = "the tests hold the fast versions against it"))]
pub(super) fn linear(weights: PackedMatrix<'_>, x: &QuantisedRows, n_tokens: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let layout = weights.layout();
    let Layout { rows, group, .. } = layout;
    let mut y = Vec::with_capacity(n_tokens * rows);
    for t in 0..n_tokens {
        let token = Row::of(x.rows(t..t + 1), &layout);
        let aq: Vec<i32> = (0..layout.padded_cols() / 4).flat_map(|index| token.four(index)).collect();
        for n in 0..rows {
            let (values, scales) = weights.tile(n / TILE_ROWS);
            let lane = n % TILE_ROWS;
            let mut sum = bias.map_or(0.0, |b| b[n]);
            for g in 0..layout.n_groups() {
                let product = |k: usize| (values[(k / 4 * TILE_ROWS + lane) * 4 + k % 4] as i32 - 128) * aq[k];
                let inner: i32 = (g * group..(g + 1) * group).map(product).sum();
                let scale = f16::from_bits(scales[g * TILE_ROWS + lane]).to_f32() * f32::from_bits(token.scales[g] as u32);
                sum = (inner as f32).mul_add(scale, sum);
            }
            y.push(sum);
        }
    }
    y
}
