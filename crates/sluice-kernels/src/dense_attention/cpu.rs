//! Dense attention as tiles of 64 queries against all keys up to the last of them, or simply all.

use std::ops::Range;

use sluice_tensor::Tensor;

use super::WHOLE;
use crate::attention_tile::{self, Grads, Masks, Tile, Tiler};
use crate::routed_attention::Dims;

pub(super) fn fwd(dims: &Dims, q: &Tensor, k: &Tensor, v: &Tensor, start: usize, lens: &[usize]) -> (Tensor, Tensor) {
    let mean_keys = if start == WHOLE { dims.s } else { start + dims.t / 2 };
    attention_tile::fwd(dims, q, k, v, lens, mean_keys, &Dense::new(dims, start, lens))
}

pub(super) fn bwd(
    dims: &Dims,
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    start: usize,
    lens: &[usize],
) -> (Tensor, Tensor, Tensor) {
    let Grads { dq, dk, dv, .. } = attention_tile::bwd(dims, [dout, q, k, v, o, lse], lens, &Dense::new(dims, start, lens));
    (dq, dk, dv)
}

struct Dense<'a> {
    start: usize,
    lens: &'a [usize],
    /// `0..S`
    rows: Vec<u32>,
}

impl<'a> Dense<'a> {
    fn new(dims: &Dims, start: usize, lens: &'a [usize]) -> Self {
        Self { start, lens, rows: (0..dims.s as u32).collect() }
    }
}

impl Tiler for Dense<'_> {
    /// The diagonal.
    type State = Masks;

    fn state(&self) -> Masks {
        Masks::new()
    }

    fn tiles(&self, masks: &mut Masks, b: usize, _g: usize, span: Range<usize>, each: &mut dyn FnMut(&Tile<'_>)) {
        masks.clear(false);
        if self.start == WHOLE {
            let n = self.lens[b];
            return each(&Tile { first: span.start, n: span.len(), rows: &self.rows[..n], n_plain: n, masks });
        }
        for t in 1..span.len() {
            let row = masks.push_hidden();
            masks.show(row, t, span.len() - 1);
        }
        let (n_plain, end) = (self.start + span.start + 1, self.start + span.end);
        each(&Tile { first: span.start, n: span.len(), rows: &self.rows[..end], n_plain, masks });
    }

    fn end_row(&self, b: usize, _g: usize, queries: Range<usize>) -> usize {
        if self.start == WHOLE { self.lens[b] } else { self.start + queries.end }
    }

    fn work_until(&self, t: usize) -> f64 {
        let (start, t) = (self.start as f64, t as f64);
        // Where all see the same, queries are as good a unit as any.
        if self.start == WHOLE { t } else { t * (start + t / 2.0) }
    }
}
