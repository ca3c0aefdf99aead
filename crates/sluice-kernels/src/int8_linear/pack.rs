//! Float weights to the order of the kernels. Runs once per matrix, when an artifact is made.

use half::f16;

use super::{Layout, TILE_ROWS};
use crate::vector_math::vectorised;

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

/// Numerators and denominators of the steps that [`group_scale`] tries: `largest * 127 / (127 n)`, and the range by multiples of the levels
/// of four and five bits.
const STEPS_OF_LARGEST: std::ops::RangeInclusive<u32> = 112..=130;
const LEVELS: [u32; 2] = [15, 31];

/// The scale, an f16, that rounds a group with the least squared error.
///
/// `max |w| / 127` is tried first: a group of a Q8_0 file is exact with it, and an exact one stays. Blocks of four or five bits
/// with an offset (Q4_1, Q5_1) have `max - min` as 15 or 31 of their own steps: dividing that step by a whole number puts their levels onto ours
/// up to a common shift, and among the divisors there is one where the shift is small. Other groups gain from a few scales beside the first.
fn group_scale(weights: &[f32]) -> Result<f16, (usize, f32)> {
    if let Some(at) = weights.iter().position(|w| !w.is_finite()) {
        return Err((at, weights[at]));
    }
    let (at, largest) = weights.iter().enumerate().fold((0, 0.0f32), |best, (i, w)| if w.abs() > best.1 { (i, w.abs()) } else { best });
    let first = f16::from_f32(largest / 127.0);
    if first.is_infinite() {
        return Err((at, weights[at]));
    }
    if first.to_f32() == 0.0 {
        return Ok(first);
    }
    let (min, max) = weights.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), &w| (min.min(w), max.max(w)));
    let beside = STEPS_OF_LARGEST.map(|n| largest / n as f32);
    let of_levels = LEVELS.into_iter().flat_map(|levels| (1..=254 / levels).map(move |n| (max - min) / (levels * n) as f32));
    let mut best = (first, squared_error(weights, first.to_f32()));
    for scale in beside.chain(of_levels) {
        let scale = f16::from_f32(scale);
        if scale.to_f32() == 0.0 || best.1 == 0.0 {
            continue;
        }
        let error = squared_error(weights, scale.to_f32());
        if error < best.1 {
            best = (scale, error);
        }
    }
    Ok(best.0)
}

vectorised! {
    /// What rounding with a scale costs: `sum (w - scale q)^2`.
    fn squared_error(weights: &[f32], scale: f32) -> f32 {
        let (mut lanes, inverse) = ([0.0f32; 8], 1.0 / scale);
        let error = |w: f32| {
            // Adding and subtracting 1.5 * 2^23 rounds to nearest, ties to even.
            let q = (w * inverse + 12_582_912.0) - 12_582_912.0;
            let q = if q > 127.0 { 127.0 } else { q };
            let q = if q < -127.0 { -127.0 } else { q };
            (w - q * scale) * (w - q * scale)
        };
        let (blocks, rest) = weights.as_chunks::<8>();
        for block in blocks {
            for i in 0..8 {
                lanes[i] += error(block[i]);
            }
        }
        lanes.iter().sum::<f32>() + rest.iter().map(|&w| error(w)).sum::<f32>()
    }
}
