//! The matrix product of every linear layer, on slices: a thin, checked door to the `gemm` crate,
//! which reaches PyTorch's f32 speed on the CPUs we measured (benches/results).
//!
//! Large products use all threads of the rayon pool; small ones stay on the calling thread, so that
//! kernels can call this from inside their own parallel loops.

use gemm::Parallelism;

/// A row-major matrix, or its transpose, inside a slice.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A contiguous row-major `[rows, cols]`.
    #[track_caller]
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::with_row_stride(data, rows, cols, cols)
    }

    /// A `[rows, cols]` whose rows start `row_stride` elements apart.
    #[track_caller]
    pub fn with_row_stride(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(row_stride >= cols, "rows of {cols} elements overlap at stride {row_stride}");
        assert!(
            rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= data.len(),
            "[{rows}, {cols}] with row stride {row_stride} does not fit in {} elements",
            data.len()
        );
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// `c = a b` (or `c += a b` with `accumulate`), `c` row-major `[a.rows, b.cols]` with `c_row_stride`.
#[track_caller]
pub fn gemm(a: Mat<'_>, b: Mat<'_>, c: &mut [f32], c_row_stride: usize, accumulate: bool) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert_eq!(k, b.rows, "product of [{m}, {k}] and [{}, {n}]", b.rows);
    assert!(c_row_stride >= n, "rows of {n} elements overlap at stride {c_row_stride}");
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * c_row_stride + n <= c.len(), "[{m}, {n}] with row stride {c_row_stride} does not fit in {} elements", c.len());
    let threads = rayon::current_num_threads();
    // Below about a million multiply-adds waking the other threads costs more than it gains.
    let parallelism = if threads > 1 && m * n * k >= 1 << 20 { Parallelism::Rayon(threads) } else { Parallelism::None };
    // What remains of the old `c`; with 0 it is not even read (`read_dst` below).
    let keep = if accumulate { 1.0 } else { 0.0 };
    // SAFETY: `Mat` and the asserts above prove that every element addressed by the shapes and strides
    // lies inside its slice, and `c` is borrowed mutably, so it overlaps neither input.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_row_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            keep,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `x [m, k]` times the transpose of `w [n, k]`: what a linear layer does. Returns `[m, n]`.
#[track_caller]
pub fn matmul_nt(x: &[f32], w: &[f32], m: usize, k: usize, n: usize) -> Vec<f32> {
    let mut y = vec![0.0; m * n];
    gemm(Mat::new(x, m, k), Mat::new(w, n, k).t(), &mut y, n, false);
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn product_equals_the_triple_loop_for_odd_shapes_and_transposes() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 7), (63, 100, 17), (130, 64, 257)] {
            let a: Vec<f32> = (0..m * k).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
            let b: Vec<f32> = (0..n * k).map(|i| ((i * 53 % 97) as f32 - 48.0) / 48.0).collect();
            let mut want = vec![0.0f64; m * n];
            for i in 0..m {
                for j in 0..n {
                    want[i * n + j] = (0..k).map(|p| a[i * k + p] as f64 * b[j * k + p] as f64).sum();
                }
            }
            let got = matmul_nt(&a, &b, m, k, n);
            let mut twice = got.clone();
            gemm(Mat::new(&a, m, k), Mat::new(&b, n, k).t(), &mut twice, n, true);
            for i in 0..m * n {
                assert!((got[i] as f64 - want[i]).abs() < 1e-4, "({m}, {k}, {n}) at {i}: {} != {}", got[i], want[i]);
                assert!((twice[i] as f64 - 2.0 * want[i]).abs() < 2e-4);
            }
        }
    }

    #[test]
    fn empty_inner_dimension_clears_the_output() {
        let mut c = [f32::NAN; 6];
        gemm(Mat::new(&[], 2, 0), Mat::new(&[], 0, 3), &mut c, 3, false);
        assert_eq!(c, [0.0; 6]);
    }
}
