//! Inner loop for AVX2: eight rows a vector, `vpmaddwd` on the even and on the odd bytes of the weights, as sixteen bits each. AVX-VNNI
//! has the same loop with another instruction in its middle.
//!
//! `vpmaddubsw` would take a byte of each operand, but needs the signs moved to one of them, and another multiplication to
//! widen its sums: as many multiplications, and more of the rest.

use std::arch::x86_64::*;

/// Define `run`; `multiply_add(sums, weights, activations)` adds the products of both pairs of vectors.
macro_rules! eight_rows_a_vector {
    ($features:literal) => {
        use $crate::int8_linear::activations::Row;
        use $crate::int8_linear::{TILE_ROWS, Task};

        /// Rows of a vector.
        const LANES: usize = 8;

        /// Bytes between the weights in use and those that are fetched meanwhile.
        const AHEAD: usize = 2048;

        /// # Safety
        /// The machine has the features that are named here; `task` holds whole tokens of the weights' layout.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn run(task: &Task<'_>, out: &mut [f32]) {
            for tile in task.tiles.clone() {
                let mut token = 0;
                while token < task.n_tokens {
                    // SAFETY: the caller's contract. Six tokens are what sixteen registers hold.
                    token += unsafe {
                        match task.n_tokens - token {
                            6.. => tile_of_tokens::<6, 1>(task, tile, token, out),
                            4.. => tile_of_tokens::<4, 1>(task, tile, token, out),
                            2.. => tile_of_tokens::<2, 2>(task, tile, token, out),
                            _ => tile_of_tokens::<1, 2>(task, tile, token, out),
                        }
                    };
                }
            }
        }

        /// One tile times `T` tokens, `V` vectors of rows at once; returns `T`.
        ///
        /// # Safety
        /// As [`run`].
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn tile_of_tokens<const T: usize, const V: usize>(task: &Task<'_>, tile: usize, first: usize, out: &mut [f32]) -> usize {
            let layout = task.weights.layout;
            let (values, scales) = task.weights.tile(tile);
            let words = task.tokens.len() / task.n_tokens;
            let row = |t: usize| Row::of(&task.tokens[(first + t) * words..(first + t + 1) * words], &layout);
            let rows: [Row<'_>; T] = std::array::from_fn(row);
            let words_per_group = layout.group / 4;
            let start = task.start(tile);
            let mut results = [[0.0f32; TILE_ROWS]; T];
            for lane in (0..TILE_ROWS).step_by(V * LANES) {
                // SAFETY: a tile has `n_groups * words_per_group` words of TILE_ROWS rows and `n_groups * TILE_ROWS` scales;
                // each row of tokens has twice `n_groups * words_per_group` words, `n_groups` scales and surpluses.
                unsafe {
                    let even_bytes = _mm256_set1_epi16(0xff);
                    let mut sums = [[_mm256_setzero_ps(); V]; T];
                    for t in 0..T {
                        for v in 0..V {
                            sums[t][v] = _mm256_loadu_ps(start.as_ptr().wrapping_add(lane + v * LANES));
                        }
                    }
                    let mut w = values.as_ptr().wrapping_add(lane * 4);
                    let mut pair = 0;
                    for g in 0..layout.n_groups() {
                        let mut inner = [[_mm256_setzero_si256(); V]; T];
                        for t in 0..T {
                            inner[t] = [_mm256_set1_epi32(*rows[t].surplus.as_ptr().wrapping_add(g)); V];
                        }
                        for _ in 0..words_per_group {
                            if T == 1 {
                                // One token waits for memory alone; the processor's own prefetching stops at every page.
                                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD).cast());
                            }
                            let (mut even, mut odd) = ([_mm256_setzero_si256(); V], [_mm256_setzero_si256(); V]);
                            for v in 0..V {
                                let bytes = _mm256_loadu_si256(w.wrapping_add(v * 4 * LANES).cast());
                                even[v] = _mm256_and_si256(bytes, even_bytes);
                                odd[v] = _mm256_srli_epi16::<8>(bytes);
                            }
                            for t in 0..T {
                                let a = rows[t].values.as_ptr().wrapping_add(pair);
                                let (a_even, a_odd) = (_mm256_set1_epi32(*a), _mm256_set1_epi32(*a.wrapping_add(1)));
                                for v in 0..V {
                                    inner[t][v] = multiply_add(inner[t][v], [even[v], odd[v]], [a_even, a_odd]);
                                }
                            }
                            w = w.wrapping_add(4 * TILE_ROWS);
                            pair += 2;
                        }
                        for v in 0..V {
                            let scales = scales.as_ptr().wrapping_add(g * TILE_ROWS + lane + v * LANES);
                            let scale = _mm256_cvtph_ps(_mm_loadu_si128(scales.cast()));
                            for t in 0..T {
                                let token_scale = _mm256_set1_ps(f32::from_bits(*rows[t].scales.as_ptr().wrapping_add(g) as u32));
                                sums[t][v] =
                                    _mm256_fmadd_ps(_mm256_cvtepi32_ps(inner[t][v]), _mm256_mul_ps(scale, token_scale), sums[t][v]);
                            }
                        }
                    }
                    for t in 0..T {
                        for v in 0..V {
                            _mm256_storeu_ps(results[t].as_mut_ptr().wrapping_add(lane + v * LANES), sums[t][v]);
                        }
                    }
                }
            }
            for (t, result) in results.iter().enumerate() {
                task.store(first + t, tile, result, out);
            }
            T
        }
    };
}
pub(super) use eight_rows_a_vector;

eight_rows_a_vector!("avx2,fma,f16c");

#[inline]
#[target_feature(enable = "avx2")]
fn multiply_add(sums: __m256i, w: [__m256i; 2], a: [__m256i; 2]) -> __m256i {
    let products = _mm256_add_epi32(_mm256_madd_epi16(w[0], a[0]), _mm256_madd_epi16(w[1], a[1]));
    _mm256_add_epi32(sums, products)
}
