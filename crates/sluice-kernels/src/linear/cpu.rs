//! The three products of a linear layer on slices, with `w` in either format.
//!
//! One product is limited by arithmetic and goes to GEMM; the product of a few rows, as in decoding, is limited
//! by reading `w` once, which GEMM does badly because it copies `w` into panels first.

use half::bf16;
use sluice_tensor::gemm::{Mat, gemm};
use sluice_tensor::memory::Scratch;
use sluice_tensor::{DType, Tensor};

use crate::row_chunks::{for_each_chunk, rows_per_chunk};
use crate::simd::{Simd, dispatch};
use crate::vector_math::vectorised;

/// Elements of `w` widened from bf16 at a time: 1 MiB of f32, half of a usual L2 cache's worth per core.
const WIDENED: usize = 1 << 18;

/// `y [n_rows, N] = x [n_rows, K] w^T`; whatever was in `y` is overwritten.
#[track_caller]
pub(crate) fn project(x: &[f32], n_rows: usize, w: &Tensor, y: &mut [f32]) {
    let [n_out, n_in] = w.dims();
    if n_rows <= FEW_ROWS {
        return match w.dtype() {
            DType::F32 => project_few_rows(x, n_rows, w.f32(), n_in, &mut y[..n_rows * n_out], few_rows_f32),
            DType::Bf16 => project_few_rows(x, n_rows, w.bf16(), n_in, &mut y[..n_rows * n_out], few_rows_bf16),
        };
    }
    for_each_block_of_rows(w, |first, block, n| {
        gemm(Mat::new(x, n_rows, n_in), Mat::new(block, n, n_in).t(), &mut y[first.min(n_rows * n_out)..], n_out, false);
    });
}

/// Up to here one pass over `w` with plain dot products beats GEMM.
const FEW_ROWS: usize = 16;

/// `y = x w^T` for a few rows: threads share out the rows of `w`, and each is read once.
/// `few_rows` writes the transpose `[N, n_rows]` for a range of rows of `w`.
fn project_few_rows<W: Sync>(
    x: &[f32],
    n_rows: usize,
    w: &[W],
    n_in: usize,
    y: &mut [f32],
    few_rows: impl Fn(&[f32], &[W], usize, &mut [f32]) + Sync,
) {
    if y.is_empty() || n_in == 0 {
        return y.fill(0.0);
    }
    let per_chunk = rows_per_chunk(n_in);
    let block = |i: usize, n: usize| &w[i * per_chunk * n_in..][..n * n_in];
    if n_rows == 1 {
        return for_each_chunk(y, per_chunk, |i, y| few_rows(x, block(i, y.len()), n_in, y));
    }
    let n_out = y.len() / n_rows;
    let mut transposed = vec![0.0; y.len()]; // [N, n_rows]
    for_each_chunk(&mut transposed, per_chunk * n_rows, |i, y| few_rows(x, block(i, y.len() / n_rows), n_in, y));
    for (j, column) in transposed.chunks_exact(n_rows).enumerate() {
        column.iter().enumerate().for_each(|(i, &value)| y[i * n_out + j] = value);
    }
}

/// Widens as many rows at a time as a tile has, so that they are still in the L1 cache when it reads them.
fn few_rows_bf16(x: &[f32], w: &[bf16], n_in: usize, y: &mut [f32]) {
    let n_rows = x.len() / n_in;
    let mut wide = vec![0.0; TILE * n_in];
    for (w, y) in w.chunks(TILE * n_in).zip(y.chunks_mut(TILE * n_rows)) {
        let wide = &mut wide[..w.len()];
        widen(w, wide);
        few_rows_f32(x, wide, n_in, y);
    }
}

vectorised! {
    fn widen(narrow: &[bf16], wide: &mut [f32]) {
        for (wide, narrow) in wide.iter_mut().zip(narrow) {
            *wide = f32::from_bits((narrow.to_bits() as u32) << 16);
        }
    }
}

fn few_rows_f32(x: &[f32], w: &[f32], n_in: usize, y: &mut [f32]) {
    let (n_rows, n_out) = (x.len() / n_in, w.len() / n_in);
    assert!(x.len() == n_rows * n_in && w.len() == n_out * n_in && y.len() == n_out * n_rows);
    // SAFETY: the rows of all three have the asserted sizes.
    unsafe { dots_on_this_machine(x, w, n_in, y) }
}

dispatch! {
    unsafe fn dots_on_this_machine(x: &[f32], w: &[f32], n_in: usize, y: &mut [f32]) = all_dots;
}

/// Dot products of a tile: enough to hide the latency of an addition, few enough for the registers.
const TILE: usize = 8;

/// `y [N, n_rows]` in tiles of four rows by two, or one by eight.
#[inline(always)]
unsafe fn all_dots<V: Simd, const M: usize>(x: &[f32], w: &[f32], n_in: usize, y: &mut [f32]) {
    let (n_rows, n_out) = (x.len() / n_in, w.len() / n_in);
    let (fours, pairs, eights) = (n_rows - n_rows % 4, n_out - n_out % 2, n_out - n_out % TILE);
    // SAFETY: tiles end at `n_rows` and `n_out`; the instruction set is the caller's promise.
    unsafe {
        for j in (0..pairs).step_by(2) {
            for i in (0..fours).step_by(4) {
                dots::<V, 4, 2>(x, i, w, j, n_in, y, n_rows);
            }
        }
        for i in (0..fours).step_by(4).filter(|_| pairs < n_out) {
            dots::<V, 4, 1>(x, i, w, pairs, n_in, y, n_rows);
        }
        for i in fours..n_rows {
            for j in (0..eights).step_by(TILE) {
                dots::<V, 1, TILE>(x, i, w, j, n_in, y, n_rows);
            }
            for j in eights..n_out {
                dots::<V, 1, 1>(x, i, w, j, n_in, y, n_rows);
            }
        }
    }
}

/// Dot products of `X` rows of `x` from row `i` with `N` rows of `w` from row `j`. Each is added up in the
/// same order whatever the tile, so a row has the same bits alone and among others.
#[inline(always)]
unsafe fn dots<V: Simd, const X: usize, const N: usize>(
    x: &[f32],
    i: usize,
    w: &[f32],
    j: usize,
    n_in: usize,
    y: &mut [f32],
    n_rows: usize,
) {
    let (x_from, w_from) = (x[i * n_in..(i + X) * n_in].as_ptr(), w[j * n_in..(j + N) * n_in].as_ptr());
    let whole = n_in - n_in % V::LANES;
    // SAFETY: the slices above hold the `X` and `N` rows, of which each load stays within the first `whole`
    // elements; the instruction set is the caller's promise.
    unsafe {
        let mut acc = [[V::splat(0.0); X]; N];
        let mut at = 0;
        while at < whole {
            let mut x_lanes = [V::splat(0.0); X];
            for r in 0..X {
                x_lanes[r] = V::load(x_from.wrapping_add(r * n_in + at));
            }
            for c in 0..N {
                let w_lanes = V::load(w_from.wrapping_add(c * n_in + at));
                for r in 0..X {
                    acc[c][r] = x_lanes[r].mul_add(w_lanes, acc[c][r]);
                }
            }
            at += V::LANES;
        }
        for c in 0..N {
            for r in 0..X {
                let mut sum = acc[c][r].sum();
                for p in whole..n_in {
                    sum += x[(i + r) * n_in + p] * w[(j + c) * n_in + p];
                }
                y[(j + c) * n_rows + i + r] = sum;
            }
        }
    }
}

/// `dx [n_rows, K] = dy [n_rows, N] w`; whatever was in `dx` is overwritten.
#[track_caller]
pub(crate) fn project_back(dy: &[f32], n_rows: usize, w: &Tensor, dx: &mut [f32]) {
    let [n_out, n_in] = w.dims();
    if n_out == 0 {
        dx.fill(0.0);
    }
    for_each_block_of_rows(w, |first, block, n| {
        let dy = Mat::with_row_stride(&dy[first.min(n_rows * n_out)..], n_rows, n, n_out);
        gemm(dy, Mat::new(block, n, n_in), dx, n_in, first > 0);
    });
}

/// `dw [N, K] = dy [n_rows, N]^T x [n_rows, K]`, or `+=` with `accumulate`; without it, `dw` is not even read.
#[track_caller]
pub(crate) fn weight_gradient(dy: &[f32], x: &[f32], n_rows: usize, dw: &mut [f32], (n_out, n_in): (usize, usize), accumulate: bool) {
    gemm(Mat::new(dy, n_rows, n_out).t(), Mat::new(x, n_rows, n_in), dw, n_in, accumulate);
}

/// `work(first row, f32 elements, number of rows)` for blocks of rows that cover `w`.
fn for_each_block_of_rows(w: &Tensor, mut work: impl FnMut(usize, &[f32], usize)) {
    let [n_out, n_in] = w.dims();
    match w.dtype() {
        DType::F32 => work(0, w.f32(), n_out),
        DType::Bf16 => {
            let per_block = (WIDENED / n_in.max(1)).clamp(1, n_out.max(1));
            let mut scratch = Scratch::zeros(per_block * n_in);
            for first in (0..n_out).step_by(per_block) {
                let n = per_block.min(n_out - first);
                let block = &mut scratch[..n * n_in];
                widen(&w.bf16()[first * n_in..(first + n) * n_in], block);
                work(first, block, n);
            }
        }
    }
}
