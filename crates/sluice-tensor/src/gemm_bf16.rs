//! Matrix product in bf16 with f32 sums, for weights that are packed once and used often: the frozen layers
//! of a teacher. Uses AVX512-BF16 where the CPU has it, otherwise the f32 product on widened weights.
//! Knows nothing about layers; what is evaluated or trained stays with [`gemm`](crate::gemm).
//!
//! Both factors are rounded to bf16 (relative error 2^-9 each), products and sums are f32.

use half::bf16;
use rayon::prelude::*;

use crate::gemm::{Mat, gemm};
use crate::memory;

/// Columns of the result that one panel of packed weights gives: four AVX-512 registers.
const PANEL: usize = 64;

/// A weight `[n, k]` in bf16, laid out for the kernel.
///
/// Panel by panel of [`PANEL`] rows of `w`; inside, for every two neighbours along `k`, the pairs of all
/// rows of the panel side by side, which is what one instruction multiplies. Filled up with zeros.
pub struct PackedBf16 {
    pairs: Vec<[bf16; 2]>,
    n: usize,
    k: usize,
}

impl PackedBf16 {
    /// Round and rearrange `w [n, k]`.
    #[track_caller]
    pub fn pack(w: &[f32], n: usize, k: usize) -> Self {
        assert_eq!(w.len(), n * k, "packing {} elements as [{n}, {k}]", w.len());
        let per_panel = k.div_ceil(2) * PANEL;
        let mut pairs = vec![[bf16::ZERO; 2]; n.div_ceil(PANEL) * per_panel];
        if per_panel > 0 {
            pairs.par_chunks_mut(per_panel).enumerate().for_each(|(i, panel)| {
                for (c, row) in w[i * PANEL * k..].chunks_exact(k).take(PANEL).enumerate() {
                    for (p, pair) in row.chunks(2).enumerate() {
                        let second = pair.get(1).map_or(bf16::ZERO, |&x| bf16::from_f32(x));
                        panel[p * PANEL + c] = [bf16::from_f32(pair[0]), second];
                    }
                }
            });
        }
        memory::allocated(pairs.len() * 4);
        Self { pairs, n, k }
    }

    /// `n`: outputs of the layer.
    pub fn n(&self) -> usize {
        self.n
    }

    /// `k`: inputs of the layer.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The first `rows` rows of a panel of the weight as f32, `[rows, k]`.
    fn widened(&self, panel: usize, rows: usize) -> Vec<f32> {
        let per_panel = self.k.div_ceil(2) * PANEL;
        let pairs = &self.pairs[panel * per_panel..(panel + 1) * per_panel];
        let element = |c: usize, p: usize| pairs[p / 2 * PANEL + c][p % 2].to_f32();
        (0..rows).flat_map(|c| (0..self.k).map(move |p| (c, p))).map(|(c, p)| element(c, p)).collect()
    }
}

impl Drop for PackedBf16 {
    fn drop(&mut self) {
        memory::freed(self.pairs.len() * 4);
    }
}

/// Whether the CPU multiplies bf16 itself. If not, packed weights save memory but no time.
pub fn is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `x [m, k]` times the transpose of the packed `w [n, k]`; returns `[m, n]`.
#[track_caller]
pub fn matmul_nt_packed(x: &[f32], m: usize, k: usize, w: &PackedBf16) -> Vec<f32> {
    assert!(k == w.k && x.len() == m * k, "product of {} elements as [{m}, {k}] and packed [{}, {}]", x.len(), w.n, w.k);
    let mut y = vec![0.0; m * w.n];
    if y.is_empty() || k == 0 {
        return y;
    }
    #[cfg(target_arch = "x86_64")]
    if is_fast() {
        avx512_bf16::product(x, m, w, &mut y);
        return y;
    }
    product_of_widened(x, m, w, &mut y);
    y
}

/// One panel of the weight at a time as f32; `x` is rounded too, so that every CPU computes the same function.
fn product_of_widened(x: &[f32], m: usize, w: &PackedBf16, y: &mut [f32]) {
    let rounded: Vec<f32> = x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
    for (panel, first) in (0..w.n).step_by(PANEL).enumerate() {
        let rows = PANEL.min(w.n - first);
        let block = w.widened(panel, rows);
        gemm(Mat::new(&rounded, m, w.k), Mat::new(&block, rows, w.k).t(), &mut y[first..], w.n, false);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512_bf16 {
    use std::arch::x86_64::*;

    use half::bf16;
    use rayon::prelude::*;

    use super::{PANEL, PackedBf16};

    /// Rows of a tile of the result. 6 x 4 registers of sums leave enough for the factors.
    const ROWS: usize = 6;

    /// Pairs along `k` between two visits of the result: keeps a panel and a block of `x` in the L2 cache.
    const PAIRS: usize = 512;

    /// Rows of `x` that a thread takes at a time: converted once, then multiplied with every panel.
    const BLOCK: usize = 16 * ROWS;

    pub(super) fn product(x: &[f32], m: usize, w: &PackedBf16, y: &mut [f32]) {
        let (n, k) = (w.n, w.k);
        // Few rows still make a task for every thread. The result of a row does not depend on its block.
        let block = m.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(ROWS).min(BLOCK);
        let work = |i: usize, y: &mut [f32]| {
            let rows = y.len() / n;
            // SAFETY: the caller of `product` found the instruction set.
            unsafe { block_product(&x[i * block * k..][..rows * k], rows, w, y) }
        };
        if m <= block {
            work(0, y);
        } else {
            y.par_chunks_mut(block * n).enumerate().for_each(|(i, y)| work(i, y));
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn block_product(x: &[f32], rows: usize, w: &PackedBf16, y: &mut [f32]) {
        let (n, k) = (w.n, w.k);
        let n_pairs = k.div_ceil(2);
        let mut narrow = vec![[bf16::ZERO; 2]; rows.next_multiple_of(ROWS) * n_pairs]; // [rows, k / 2]
        for (x, narrow) in x.chunks_exact(k).zip(narrow.chunks_exact_mut(n_pairs)) {
            round_row(x, &mut narrow.as_flattened_mut()[..k]);
        }
        for first_pair in (0..n_pairs).step_by(PAIRS) {
            let pairs = PAIRS.min(n_pairs - first_pair);
            for (panel, first_col) in (0..n).step_by(PANEL).enumerate() {
                let w = &w.pairs[(panel * n_pairs + first_pair) * PANEL..][..pairs * PANEL];
                for first_row in (0..rows).step_by(ROWS) {
                    let x = &narrow[first_row * n_pairs + first_pair..];
                    let tile = Tile {
                        rows: ROWS.min(rows - first_row),
                        columns: PANEL.min(n - first_col),
                        row_stride: n,
                        accumulate: first_pair > 0,
                    };
                    assert!(x.len() >= (ROWS - 1) * n_pairs + pairs && w.len() == pairs * PANEL);
                    let y = &mut y[first_row * n + first_col..];
                    assert!(y.len() >= (tile.rows - 1) * n + tile.columns);
                    // SAFETY: the asserts are what the function asks for.
                    unsafe { tile_product(x.as_ptr().cast(), n_pairs, w.as_ptr().cast(), pairs, y.as_mut_ptr(), tile) }
                }
            }
        }
    }

    /// The part of the result that a tile covers.
    struct Tile {
        rows: usize,
        columns: usize,
        row_stride: usize,
        accumulate: bool,
    }

    /// Sums over `pairs` pairs of up to `ROWS x PANEL` results.
    ///
    /// # Safety
    /// `x` has `ROWS` rows of `pairs` pairs, `x_stride` apart; `w` has `pairs * PANEL` pairs; `y` has `tile.rows`
    /// rows of `tile.columns`, `tile.row_stride` apart.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn tile_product(x: *const i32, x_stride: usize, w: *const i32, pairs: usize, y: *mut f32, tile: Tile) {
        let mut sums = [[_mm512_setzero_ps(); 4]; ROWS];
        // SAFETY: all offsets are within what the caller vouches for.
        unsafe {
            for p in 0..pairs {
                let w = w.wrapping_add(p * PANEL);
                let mut columns = [_mm512_setzero_si512(); 4];
                for v in 0..4 {
                    columns[v] = _mm512_loadu_si512(w.wrapping_add(v * 16).cast());
                }
                for r in 0..ROWS {
                    let pair = as_bf16(_mm512_set1_epi32(*x.wrapping_add(r * x_stride + p)));
                    for v in 0..4 {
                        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], pair, as_bf16(columns[v]));
                    }
                }
            }
            for r in 0..ROWS {
                if r < tile.rows {
                    for v in 0..4 {
                        let y = y.wrapping_add(r * tile.row_stride + v * 16);
                        let present = (1u64 << tile.columns.saturating_sub(v * 16).min(16)) - 1;
                        let mask = present as __mmask16;
                        let old = if tile.accumulate { _mm512_maskz_loadu_ps(mask, y) } else { _mm512_setzero_ps() };
                        _mm512_mask_storeu_ps(y, mask, _mm512_add_ps(old, sums[r][v]));
                    }
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn as_bf16(x: __m512i) -> __m512bh {
        // SAFETY: both are 64 bytes of plain numbers.
        unsafe { std::mem::transmute(x) }
    }

    /// Round to the nearest bf16, ties to even.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn round_row(x: &[f32], narrow: &mut [bf16]) {
        let (x_blocks, x_rest) = x.as_chunks::<16>();
        let (blocks, rest) = narrow.as_chunks_mut::<16>();
        for (x, narrow) in x_blocks.iter().zip(blocks) {
            // SAFETY: both sides are 32 bytes of plain numbers, `x` 64.
            unsafe { *narrow = std::mem::transmute::<__m256bh, [bf16; 16]>(_mm512_cvtneps_pbh(_mm512_loadu_ps(x.as_ptr()))) };
        }
        for (x, narrow) in x_rest.iter().zip(rest) {
            *narrow = bf16::from_f32(*x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `(m, n, k)`.
    const CASES: &[(usize, usize, usize)] = &[
        (1, 1, 1),
        (3, 63, 5),
        (6, 64, 100),
        (7, 65, 101),
        (100, 130, 63),
        (250, 100, 1000),
        // More than one visit of the result along k.
        (13, 70, 2500),
        (0, 5, 3),
        (3, 0, 5),
        (3, 5, 0),
    ];

    fn numbers(n: usize, step: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * step + i / 7) % 211) as f32 / 53.0 - 2.0).collect()
    }

    /// Triple loop in f64 over the rounded factors.
    fn naive(x: &[f32], w: &[f32], m: usize, n: usize, k: usize) -> Vec<f64> {
        let rounded = |x: f32| bf16::from_f32(x).to_f64();
        let mut y = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                y[i * n + j] = (0..k).map(|p| rounded(x[i * k + p]) * rounded(w[j * k + p])).sum();
            }
        }
        y
    }

    fn check(what: &str, got: &[f32], want: &[f64], k: usize) {
        assert_eq!(got.len(), want.len());
        for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
            assert!((got as f64 - want).abs() < 1e-6 * (k as f64 + 4.0), "{what} at {i}: {got}, expected {want}");
        }
    }

    #[test]
    fn product_equals_the_triple_loop_over_rounded_factors() {
        for &(m, n, k) in CASES {
            let (x, w) = (numbers(m * k, 37), numbers(n * k, 59));
            let want = naive(&x, &w, m, n, k);
            let packed = PackedBf16::pack(&w, n, k);
            assert_eq!((packed.n(), packed.k()), (n, k));
            check(&format!("{m} x {n} x {k}"), &matmul_nt_packed(&x, m, k, &packed), &want, k);
            if m * n * k > 0 {
                let mut y = vec![f32::NAN; m * n];
                product_of_widened(&x, m, &packed, &mut y);
                check(&format!("{m} x {n} x {k} widened"), &y, &want, k);
            }
        }
    }

    #[test]
    fn thread_count_does_not_change_a_bit() {
        let (m, n, k) = (200, 150, 300);
        let (x, packed) = (numbers(m * k, 37), PackedBf16::pack(&numbers(n * k, 59), n, k));
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
            pool.install(|| matmul_nt_packed(&x, m, k, &packed))
        };
        assert_eq!(on(1), on(3));
        let row = matmul_nt_packed(&x[77 * k..78 * k], 1, k, &packed);
        if is_fast() {
            assert_eq!(row, on(2)[77 * n..78 * n]);
        }
    }

    #[test]
    #[should_panic(expected = "as [2, 3] and packed [1, 4]")]
    fn wrong_width_is_refused() {
        matmul_nt_packed(&[0.0; 6], 2, 3, &PackedBf16::pack(&[0.0; 4], 1, 4));
    }
}
