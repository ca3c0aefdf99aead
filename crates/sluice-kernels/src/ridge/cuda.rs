//! Rows and labels side by side, then their Gram matrix in f64: products of two f32 are exact there.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Buffer, Gpu, KernelSource, or_raise};

use super::Sums;
use crate::launch::{launch, output, over_rows, run};

const SOURCE: KernelSource = KernelSource { name: "ridge", code: include_str!("ridge.cu") };

/// Side of the part of the sums that a block has.
const TILE: usize = 32;

pub(super) fn add(gpu: &Arc<Gpu>, sums: &Buffer, x: &Tensor, eps: f32, positions: &[u32], y: &Tensor) {
    let (m, g, n) = (x.last_dim(), y.last_dim(), positions.len());
    let width = m + 1 + g;
    assert_eq!(sums.bytes(), width * width * 8, "sums of {m} inputs and {g} labels");
    let positions = or_raise(gpu.upload_slice(positions));
    let mut rows = output(gpu, [n, width]);
    let args =
        [x.into(), (&positions).into(), y.into(), (&mut rows).into(), (n as u32).into(), (m as u32).into(), (g as u32).into(), eps.into()];
    // SAFETY: the caller checked that positions lie in `x` and that `y` is `[n, g]`.
    unsafe { run(gpu, &SOURCE, "gather_rows", over_rows(n), &args) };
    let tiles = width.div_ceil(TILE);
    let args = [(&rows).into(), sums.into(), (n as u32).into(), (width as u32).into()];
    // SAFETY: the grid covers the `[width, width]` of `sums`.
    unsafe { launch(gpu, &SOURCE, "add_gram", [tiles, tiles, 1], 256, 0, &args) };
}

/// `[M + 1 + G, M + 1 + G]`; products of different labels are nobody's and stay 0 here.
pub(super) fn side_by_side(sums: &Sums, m: usize, g: usize) -> Vec<f64> {
    let (m1, width) = (m + 1, m + 1 + g);
    let mut all = vec![0.0; width * width];
    for i in 0..m1 {
        all[i * width..][..m1].copy_from_slice(&sums.xx[i * m1..][..m1]);
        all[i * width + m1..][..g].copy_from_slice(&sums.xy[i * g..][..g]);
    }
    (0..g).for_each(|head| all[(m1 + head) * (width + 1)] = sums.yy[head]);
    all
}

pub(super) fn taken_apart(all: &[f64], m: usize, g: usize) -> Sums {
    let (m1, width) = (m + 1, m + 1 + g);
    let part = |from: usize, n: usize| (0..m1).flat_map(|i| &all[i * width + from..][..n]).copied().collect();
    Sums { xx: part(0, m1), xy: part(m1, g), yy: (0..g).map(|head| all[(m1 + head) * (width + 1)]).collect() }
}
