//! Inner loop for AVX-512 VNNI: a tile's sixteen rows are one vector, `vpdpwssd` multiplies two inputs of each at once.
//!
//! The activations have sixteen bits, so the weights are widened: `vpdpbusd` would need a product each for the activations' high
//! and low bytes, as many, and twice the accumulators, which are then put together for every group.

use std::arch::x86_64::*;

use super::activations::Row;
use super::{TILE_ROWS, Task};

/// Bytes between the weights in use and those that are fetched meanwhile.
const AHEAD: usize = 4096;

/// # Safety
/// The machine has AVX-512 F, BW and VNNI; `task` holds whole tokens of the weights' layout.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,fma")]
pub(super) unsafe fn run(task: &Task<'_>, out: &mut [f32]) {
    let mut tile = task.tiles.start;
    while tile < task.tiles.end {
        // SAFETY: the caller's contract.
        tile += unsafe {
            match task.tiles.end - tile {
                // One token takes what memory gives, and best in one stream.
                4.. if task.n_tokens > 1 => tiles::<4>(task, tile, out),
                2.. if task.n_tokens > 1 => tiles::<2>(task, tile, out),
                _ => tiles::<1>(task, tile, out),
            }
        };
    }
}

/// `V` tiles times all tokens; returns `V`.
///
/// # Safety
/// As [`run`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,fma")]
unsafe fn tiles<const V: usize>(task: &Task<'_>, tile: usize, out: &mut [f32]) -> usize {
    let mut token = 0;
    while token < task.n_tokens {
        // SAFETY: the caller's contract. Sixteen accumulators, four widened vectors of weights: what 32 registers hold.
        token += unsafe {
            match task.n_tokens - token {
                4.. => some_tokens::<V, 4>(task, tile, token, out),
                2.. => some_tokens::<V, 2>(task, tile, token, out),
                _ => some_tokens::<V, 1>(task, tile, token, out),
            }
        };
    }
    V
}

/// `V` tiles times `T` tokens; returns `T`.
///
/// # Safety
/// As [`run`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,fma")]
unsafe fn some_tokens<const V: usize, const T: usize>(task: &Task<'_>, tile: usize, first: usize, out: &mut [f32]) -> usize {
    let layout = task.weights.layout;
    let words = task.tokens.len() / task.n_tokens;
    let rows: [Row<'_>; T] = std::array::from_fn(|t| Row::of(&task.tokens[(first + t) * words..(first + t + 1) * words], &layout));
    let words_per_group = layout.group / 4;
    let mut w: [*const u8; V] = std::array::from_fn(|v| task.weights.tile(tile + v).0.as_ptr());
    let scales: [*const u16; V] = std::array::from_fn(|v| task.weights.tile(tile + v).1.as_ptr());
    // The outer sums wait in memory: the inner loop needs the registers.
    let mut sums: [[[f32; TILE_ROWS]; V]; T] = [std::array::from_fn(|v| task.start(tile + v)); T];
    // SAFETY: a tile has `n_groups * words_per_group` words of TILE_ROWS rows and `n_groups * TILE_ROWS` scales;
    // each row of tokens has twice `n_groups * words_per_group` words, `n_groups` scales and surpluses.
    unsafe {
        let low_bytes = _mm512_set1_epi16(255);
        let mut word = 0;
        for g in 0..layout.n_groups() {
            let mut inner = [[_mm512_setzero_si512(); V]; T];
            for t in 0..T {
                inner[t] = [_mm512_set1_epi32(*rows[t].surplus.as_ptr().wrapping_add(g)); V];
            }
            for _ in 0..words_per_group {
                let mut even = [_mm512_setzero_si512(); V];
                let mut odd = even;
                for v in 0..V {
                    let w_now = _mm512_loadu_si512(w[v].cast());
                    even[v] = _mm512_and_si512(w_now, low_bytes);
                    odd[v] = _mm512_srli_epi16::<8>(w_now);
                    if T == 1 {
                        // One token waits for memory alone; the processor's own prefetching stops at every page.
                        _mm_prefetch::<_MM_HINT_T0>(w[v].wrapping_add(AHEAD).cast());
                    }
                    w[v] = w[v].wrapping_add(4 * TILE_ROWS);
                }
                for t in 0..T {
                    let a = rows[t].values.as_ptr().wrapping_add(word);
                    let (a_even, a_odd) = (_mm512_set1_epi32(*a), _mm512_set1_epi32(*a.wrapping_add(1)));
                    for v in 0..V {
                        inner[t][v] = multiply_add(inner[t][v], even[v], a_even);
                        inner[t][v] = multiply_add(inner[t][v], odd[v], a_odd);
                    }
                }
                word += 2;
            }
            for v in 0..V {
                let scale = _mm512_cvtph_ps(_mm256_loadu_si256(scales[v].wrapping_add(g * TILE_ROWS).cast()));
                for t in 0..T {
                    let token_scale = _mm512_set1_ps(f32::from_bits(*rows[t].scales.as_ptr().wrapping_add(g) as u32));
                    let sum = sums[t][v].as_mut_ptr();
                    let inner = _mm512_cvtepi32_ps(inner[t][v]);
                    _mm512_storeu_ps(sum, _mm512_fmadd_ps(inner, _mm512_mul_ps(scale, token_scale), _mm512_loadu_ps(sum)));
                }
            }
        }
    }
    for (t, sums) in sums.iter().enumerate() {
        for (v, sums) in sums.iter().enumerate() {
            task.store(first + t, tile + v, sums, out);
        }
    }
    T
}

/// `_mm512_dpwssd_epi32`, which the compiler takes apart into a product and a sum where it thinks that a chain of them is too long.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn multiply_add(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: it only computes.
    unsafe {
        std::arch::asm!("vpdpwssd {0}, {1}, {2}", inout(zmm_reg) sum, in(zmm_reg) a, in(zmm_reg) b, options(pure, nomem, nostack, preserves_flags));
    }
    sum
}
