//! Float weights to the order of the kernels. Runs once per matrix, when an artifact is made.

use half::f16;

use super::{Layout, TILE_ROWS};

/// A weight that int8 cannot hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PackError {
    /// Output row.
    pub row: usize,
    /// Input column.
    pub col: usize,
    /// The weight: not finite, or so large that its scale is no f16.
    pub value: f32,
}

impl std::fmt::Display for PackError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "weight {} at row {}, column {}; expected a finite number below 8,000,000", self.value, self.row, self.col)
    }
}

impl std::error::Error for PackError {}

/// Round `weights [N, K]` to int8, symmetric, one f16 scale per row and group; returns the values and scales of a
/// [`super::PackedMatrix`].
#[track_caller]
pub fn pack(weights: &[f32], layout: Layout) -> Result<(Vec<u8>, Vec<u16>), PackError> {
    let Layout { rows, cols, group } = layout;
    assert_eq!(weights.len(), rows * cols, "weights of {layout:?}");
    let mut values = vec![128; layout.n_values()];
    let mut scales = vec![0; layout.n_scales()];
    for (row, weights) in weights.chunks_exact(cols).enumerate() {
        let (tile, lane) = (row / TILE_ROWS, row % TILE_ROWS);
        let values = &mut values[tile * layout.tile_bytes()..][..layout.tile_bytes()];
        let scales = &mut scales[tile * layout.n_groups() * TILE_ROWS..];
        for (g, weights) in weights.chunks(group).enumerate() {
            let scale = group_scale(weights).map_err(|(col, value)| PackError { row, col: g * group + col, value })?;
            scales[g * TILE_ROWS + lane] = scale.to_bits();
            let scale = scale.to_f32();
            if scale == 0.0 {
                continue; // all zero, or below the smallest f16
            }
            for (i, w) in weights.iter().enumerate() {
                let k = g * group + i;
                let q = (w / scale).round_ties_even().clamp(-127.0, 127.0);
                values[(k / 4 * TILE_ROWS + lane) * 4 + k % 4] = (q + 128.0) as u8;
            }
        }
    }
    Ok((values, scales))
}

/// `max |w| / 127` as an f16, which is what a file of Q8_0 blocks holds too: those convert without a loss.
fn group_scale(weights: &[f32]) -> Result<f16, (usize, f32)> {
    let bad = weights.iter().position(|w| !w.is_finite());
    let (at, largest) = weights.iter().enumerate().fold((0, 0.0f32), |best, (i, w)| if w.abs() > best.1 { (i, w.abs()) } else { best });
    let scale = f16::from_f32(largest / 127.0);
    match bad {
        Some(at) => Err((at, weights[at])),
        None if scale.is_infinite() => Err((at, weights[at])),
        None => Ok(scale),
    }
}
