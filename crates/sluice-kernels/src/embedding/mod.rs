//! Embedding: row `tokens[i]` of `table [V, M]`; the gradient adds row `i` of `dy` to row `tokens[i]`.

pub(crate) mod cases;
mod cuda;
pub mod naive;
#[cfg(test)]
mod tests;

use half::slice::HalfFloatSliceExt;
use sluice_tensor::{DType, Tensor};

use crate::add;
use crate::row_chunks::{for_each_chunk, rows_per_chunk};
use crate::vector_math;

/// `[n, M]`, always f32; `table` may be bf16.
#[track_caller]
pub fn fwd(tokens: &[u32], table: &Tensor) -> Tensor {
    let [vocab, m] = table.dims();
    check_tokens(tokens, vocab);
    if let Some(gpu) = table.gpu() {
        return cuda::fwd(gpu, tokens, table);
    }
    let mut y = vec![0.0; tokens.len() * m];
    let rows = rows_per_chunk(m);
    for_each_chunk(&mut y, rows * m.max(1), |chunk, y| {
        for (row, &token) in y.chunks_exact_mut(m).zip(&tokens[chunk * rows..]) {
            let range = token as usize * m..(token as usize + 1) * m;
            match table.dtype() {
                DType::F32 => row.copy_from_slice(&table.f32()[range]),
                DType::Bf16 => table.bf16()[range].convert_to_f32_slice(row),
            }
        }
    });
    Tensor::from_vec(y, [tokens.len(), m])
}

/// `[n, M]`: the sum of a row of each of three tables (words, positions, types of segments), f32; for inference.
#[track_caller]
pub fn fwd_sum(rows: [&[u32]; 3], tables: [&Tensor; 3]) -> Tensor {
    let n = rows[0].len();
    let [_, m] = tables[0].dims();
    for (rows, table) in rows.iter().zip(tables) {
        let [vocab, m_table] = table.dims();
        assert!(rows.len() == n && m_table == m, "embedding: {} rows of {:?} added to {n} rows of {m}", rows.len(), table.shape());
        check_tokens(rows, vocab);
    }
    if let Some(gpu) = tables[0].gpu() {
        return cuda::fwd_sum(gpu, rows, tables);
    }
    let mut y = fwd(rows[0], tables[0]);
    for (rows, table) in rows.iter().zip(tables).skip(1) {
        add::assign(&mut y, &fwd(rows, table));
    }
    y
}

/// Adds the gradient of the table to `dtable [V, M]`. Only rows of tokens that occur are touched: a table of its own,
/// zero almost everywhere, would be the largest gradient of a small model.
#[track_caller]
pub fn bwd(dy: &Tensor, tokens: &[u32], dtable: &mut Tensor) {
    let ([n, m], [vocab, m_table]) = (dy.dims(), dtable.dims());
    assert!(
        n == tokens.len() && m == m_table,
        "backward of embedding with dy {:?}, {} tokens and a table {:?}",
        dy.shape(),
        tokens.len(),
        dtable.shape()
    );
    check_tokens(tokens, vocab);
    if let Some(gpu) = dy.gpu() {
        return cuda::bwd(gpu, dy, tokens, dtable);
    }
    // A stable sort: the rows of one token are added in the order of the text, whatever the threads do.
    let mut by_token: Vec<usize> = (0..n).collect();
    by_token.sort_by_key(|&i| tokens[i]);
    let dy = dy.f32();
    let rows = rows_per_chunk(m);
    for_each_chunk(dtable.f32_mut(), rows * m.max(1), |chunk, dtable| {
        let first = chunk * rows;
        let begin = by_token.partition_point(|&i| (tokens[i] as usize) < first);
        for &i in by_token[begin..].iter().take_while(|&&i| (tokens[i] as usize) < first + rows) {
            let at = (tokens[i] as usize - first) * m;
            vector_math::add_assign(&mut dtable[at..at + m], &dy[i * m..(i + 1) * m]);
        }
    });
}

#[track_caller]
fn check_tokens(tokens: &[u32], vocab: usize) {
    if let Some(i) = tokens.iter().position(|&token| token as usize >= vocab) {
        panic!("embedding: token {} at {i} is outside a vocabulary of {vocab}", tokens[i]);
    }
}
