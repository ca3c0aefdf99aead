//! Inner loop for AVX-512 VNNI: a tile's sixteen rows are one vector, `vpdpbusd` multiplies four inputs of each at once, the
//! activations' high bytes and their low ones in turn.

use std::arch::x86_64::*;

use super::activations::Row;
use super::{TILE_ROWS, Task};

/// Bytes between the weights in use and those that are fetched meanwhile.
const AHEAD: usize = 2048;

/// # Safety
/// The machine has AVX-512 F, BW and VNNI; `task` holds whole tokens of the weights' layout.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,fma")]
pub(super) unsafe fn run(task: &Task<'_>, out: &mut [f32]) {
    for tile in task.tiles.clone() {
        let mut token = 0;
        while token < task.n_tokens {
            // SAFETY: the caller's contract.
            token += unsafe {
                match task.n_tokens - token {
                    8.. => tile_of_tokens::<8>(task, tile, token, out),
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
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,fma")]
unsafe fn tile_of_tokens<const T: usize>(task: &Task<'_>, tile: usize, first: usize, out: &mut [f32]) -> usize {
    let layout = task.weights.layout;
    let (values, scales) = task.weights.tile(tile);
    let words = task.tokens.len() / task.n_tokens;
    let rows: [Row<'_>; T] = std::array::from_fn(|t| Row::of(&task.tokens[(first + t) * words..(first + t + 1) * words], &layout));
    let words_per_group = layout.group / 4;
    let start = task.start(tile);
    let mut results = [[0.0f32; TILE_ROWS]; T];
    // SAFETY: a tile has `n_groups * words_per_group` words of TILE_ROWS rows and `n_groups * TILE_ROWS` scales;
    // each row of tokens has twice `n_groups * words_per_group` words, `n_groups` scales and surpluses.
    unsafe {
        let mut sums = [_mm512_loadu_ps(start.as_ptr()); T];
        let mut w = values.as_ptr();
        let mut word = 0;
        for g in 0..layout.n_groups() {
            let mut high = [_mm512_setzero_si512(); T];
            let mut low = high;
            for t in 0..T {
                low[t] = _mm512_set1_epi32(*rows[t].surplus.as_ptr().wrapping_add(g));
            }
            for _ in 0..words_per_group {
                let w_now = _mm512_loadu_si512(w.cast());
                for t in 0..T {
                    let a = rows[t].values.as_ptr().wrapping_add(word);
                    high[t] = _mm512_dpbusd_epi32(high[t], w_now, _mm512_set1_epi32(*a));
                    low[t] = _mm512_dpbusd_epi32(low[t], w_now, _mm512_set1_epi32(*a.wrapping_add(1)));
                }
                if T == 1 {
                    // One token waits for memory alone; the processor's own prefetching stops at every page.
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD).cast());
                }
                w = w.wrapping_add(4 * TILE_ROWS);
                word += 2;
            }
            let scale = _mm512_cvtph_ps(_mm256_loadu_si256(scales.as_ptr().wrapping_add(g * TILE_ROWS).cast()));
            for t in 0..T {
                let token_scale = _mm512_set1_ps(f32::from_bits(*rows[t].scales.as_ptr().wrapping_add(g) as u32));
                let inner = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(high[t]), low[t]));
                sums[t] = _mm512_fmadd_ps(inner, _mm512_mul_ps(scale, token_scale), sums[t]);
            }
        }
        for t in 0..T {
            _mm512_storeu_ps(results[t].as_mut_ptr(), sums[t]);
        }
    }
    for (t, result) in results.iter().enumerate() {
        task.store(first + t, tile, result, out);
    }
    T
}
