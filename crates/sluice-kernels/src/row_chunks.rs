//! Loops over chunks of rows on all threads, or on the calling one when the work is small.
//! Chunk boundaries depend on shapes alone, so that a sum over chunks does not depend on the thread count.

use rayon::prelude::*;

use crate::vector_math;

/// Elements of one chunk: enough to hide the cost of handing it to a thread, few enough for the L2 cache.
pub(crate) const CHUNK: usize = 1 << 14;

/// Rows of a chunk when a row has `row_len` elements.
pub(crate) fn rows_per_chunk(row_len: usize) -> usize {
    (CHUNK / row_len.max(1)).max(1)
}

/// `work(i, chunk i of out)`.
pub(crate) fn for_each_chunk<T: Send>(out: &mut [T], chunk_len: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    if out.len() <= chunk_len {
        if !out.is_empty() {
            work(0, out);
        }
    } else {
        out.par_chunks_mut(chunk_len).enumerate().for_each(|(i, chunk)| work(i, chunk));
    }
}

/// `work(i, chunk i of a, chunk i of b)` for two outputs with chunks of their own lengths.
pub(crate) fn for_each_chunk_pair<T: Send, U: Send>(
    a: (&mut [T], usize),
    b: (&mut [U], usize),
    work: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    let ((a, a_len), (b, b_len)) = (a, b);
    if a.len() <= a_len {
        if !a.is_empty() {
            work(0, a, b);
        }
    } else {
        a.par_chunks_mut(a_len).zip(b.par_chunks_mut(b_len)).enumerate().for_each(|(i, (a, b))| work(i, a, b));
    }
}

/// Sum over rows: `add(rows, partial)` adds a range of rows to a zeroed partial of `len` elements;
/// the partials are added in order.
pub(crate) fn sum_over_rows(
    n_rows: usize,
    rows_per_chunk: usize,
    len: usize,
    add: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync,
) -> Vec<f32> {
    let partials: Vec<Vec<f32>> = (0..n_rows.div_ceil(rows_per_chunk))
        .into_par_iter()
        .map(|i| {
            let mut partial = vec![0.0; len];
            add(i * rows_per_chunk..((i + 1) * rows_per_chunk).min(n_rows), &mut partial);
            partial
        })
        .collect();
    let mut total = vec![0.0; len];
    for partial in &partials {
        vector_math::add_assign(&mut total, partial);
    }
    total
}

/// Results on one and on several threads, for tests of their equality.
#[cfg(test)]
pub(crate) fn on_one_and_three_threads<R: Send>(run: impl Fn() -> R + Sync) -> (R, R) {
    let on = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("a thread pool").install(&run);
    (on(1), on(3))
}
