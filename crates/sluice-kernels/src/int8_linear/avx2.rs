//! Inner loop for AVX2: eight rows a vector, `vpmaddubsw` on magnitudes with the signs moved to the activations.
//!
//! A pair of products is at most `2 * 127 * 128 = 32512`, so the 16-bit sums never saturate and the result is exact.

use std::arch::x86_64::*;

use super::activations::Row;
use super::{TILE_ROWS, Task};

/// Rows of a vector.
const LANES: usize = 8;

/// # Safety
/// The machine has AVX2, FMA and F16C; `task` holds whole tokens of the weights' layout.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run(task: &Task<'_>, out: &mut [f32]) {
    for tile in task.tiles.clone() {
        let mut token = 0;
        while token < task.n_tokens {
            // SAFETY: the caller's contract.
            token += unsafe {
                match task.n_tokens - token {
                    4.. => tile_of_tokens::<4>(task, tile, token, out),
                    2.. => tile_of_tokens::<2>(task, tile, token, out),
                    _ => tile_of_tokens::<1>(task, tile, token, out),
                }
            };
        }
    }
}

/// One tile times `T` tokens; returns `T`.
///
/// # Safety
/// As [`run`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_of_tokens<const T: usize>(task: &Task<'_>, tile: usize, first: usize, out: &mut [f32]) -> usize {
    let layout = task.weights.layout;
    let (values, scales) = task.weights.tile(tile);
    let words = task.tokens.len() / task.n_tokens;
    let rows: [Row<'_>; T] = std::array::from_fn(|t| Row::of(&task.tokens[(first + t) * words..(first + t + 1) * words], &layout));
    let words_per_group = layout.group / 4;
    let start = task.start(tile);
    let mut results = [[0.0f32; TILE_ROWS]; T];
    for half in 0..TILE_ROWS / LANES {
        // SAFETY: a tile has `n_groups * words_per_group` words of TILE_ROWS rows and `n_groups * TILE_ROWS` scales;
        // each row of tokens has `n_groups * words_per_group` words, `n_groups` scales and surpluses.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let flip = _mm256_set1_epi8(-128);
            let mut sums = [_mm256_loadu_ps(start.as_ptr().wrapping_add(half * LANES)); T];
            let mut w = values.as_ptr().wrapping_add(half * 4 * LANES);
            let mut word = 0;
            for g in 0..layout.n_groups() {
                let mut inner = [_mm256_setzero_si256(); T];
                for _ in 0..words_per_group {
                    let signed = _mm256_xor_si256(_mm256_loadu_si256(w.cast()), flip);
                    let magnitude = _mm256_abs_epi8(signed);
                    for t in 0..T {
                        let a = _mm256_set1_epi32(*rows[t].values.as_ptr().wrapping_add(word));
                        let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(a, signed));
                        inner[t] = _mm256_add_epi32(inner[t], _mm256_madd_epi16(pairs, ones));
                    }
                    w = w.wrapping_add(4 * TILE_ROWS);
                    word += 1;
                }
                let scale = _mm256_cvtph_ps(_mm_loadu_si128(scales.as_ptr().wrapping_add(g * TILE_ROWS + half * LANES).cast()));
                for t in 0..T {
                    let token_scale = _mm256_set1_ps(f32::from_bits(*rows[t].scales.as_ptr().wrapping_add(g) as u32));
                    sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(inner[t]), _mm256_mul_ps(scale, token_scale), sums[t]);
                }
            }
            for t in 0..T {
                _mm256_storeu_ps(results[t].as_mut_ptr().wrapping_add(half * LANES), sums[t]);
            }
        }
    }
    for (t, result) in results.iter().enumerate() {
        task.store(first + t, tile, result, out);
    }
    T
}
