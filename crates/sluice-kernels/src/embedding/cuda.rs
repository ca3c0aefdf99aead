//! Rows by token. The gradient is sorted by token on the host, so no two blocks write one row and the order of a sum is that of the text.

use std::sync::Arc;

use sluice_tensor::cuda::{Gpu, KernelSource, or_raise};
use sluice_tensor::{DType, Tensor};

use crate::launch::{THREADS, act, output, over_elements, run};

const SOURCE: KernelSource = KernelSource { name: "embedding", code: include_str!("embedding.cu") };

pub(super) fn fwd(gpu: &Arc<Gpu>, tokens: &[u32], table: &Tensor) -> Tensor {
    let [_, m] = table.dims();
    let ids = or_raise(gpu.upload_slice(tokens));
    let mut y = output(gpu, [tokens.len(), m]);
    let n = y.len();
    let narrow = u32::from(table.dtype() == DType::Bf16);
    let args = [(&ids).into(), act(table), (&mut y).into(), (n as u64).into(), (m as u32).into(), narrow.into()];
    // SAFETY: the caller checked that every token is a row of the table.
    unsafe { run(gpu, &SOURCE, "embedding_fwd", over_elements(n), &args) };
    y
}

pub(super) fn fwd_sum(gpu: &Arc<Gpu>, rows: [&[u32]; 3], tables: [&Tensor; 3]) -> Tensor {
    let [_, m] = tables[0].dims();
    let n = rows[0].len();
    let ids = or_raise(gpu.upload_slice(&rows.concat()));
    let mut y = output(gpu, [n, m]);
    let [words, positions, types] = tables;
    let args = [(&ids).into(), words.into(), positions.into(), types.into(), (&mut y).into(), (n as u32).into(), (m as u32).into()];
    // SAFETY: the caller checked that every id is a row of its table.
    unsafe { run(gpu, &SOURCE, "embedding_sum", [n as u32, 1, 1], &args) };
    y
}

pub(super) fn bwd(gpu: &Arc<Gpu>, dy: &Tensor, tokens: &[u32], dtable: &mut Tensor) {
    let [_, m] = dtable.dims();
    let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
    order.sort_by_key(|&i| tokens[i as usize]); // stable
    let (mut unique, mut first) = (Vec::new(), Vec::new());
    for (k, &i) in order.iter().enumerate() {
        let token = tokens[i as usize];
        if unique.last() != Some(&token) {
            unique.push(token);
            first.push(k as u32);
        }
    }
    first.push(tokens.len() as u32);
    let grid = [unique.len() as u32, m.div_ceil(THREADS as usize) as u32, 1];
    let [unique, first, order] = [unique, first, order].map(|x| or_raise(gpu.upload_slice(&x)));
    let dy = dy.to_dtype(DType::F32);
    let args = [(&dy).into(), (&unique).into(), (&first).into(), (&order).into(), dtable.into(), (m as u32).into()];
    // SAFETY: tokens are rows of the table and `order` rows of `dy`, checked by the caller; a block has a row of the table to itself.
    unsafe { run(gpu, &SOURCE, "embedding_bwd", grid, &args) };
}
