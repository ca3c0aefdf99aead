//! Backward pass of a tile: the weights are recomputed from `lse`.
//!
//! ```text
//! P = exp(S - lse)    dV += P^T dO    dS = P (dO V^T - sum_d dO O)    dQ = dS K / sqrt(D)    dK += dS^T Q / sqrt(D)
//! ```

use std::f32::consts::LOG2_E;

use super::fwd::{NO_ROW, Place, pack, unpack};
use super::{Buffer, Inputs, Keys, LANES, QUERIES, ROWS_OF_TWO, STEP, SharedRows, Step, Tile, Workspace, padded, panel_width, products};
use crate::simd::{Simd, dispatch};

/// Output gradients and results of the forward pass: `dout, o [B, T, H, D]`, `lse [B, T, H]`.
#[derive(Clone, Copy)]
pub(crate) struct Adjoint<'a> {
    pub(crate) dout: &'a [f32],
    pub(crate) o: &'a [f32],
    pub(crate) lse: &'a [f32],
}

/// Gradients of the keys of one KV head that some tiles contribute.
pub(super) struct KeyGrads {
    /// `[rows, D rounded up]`, still without the softmax scale.
    dk: Buffer,
    /// `[rows, D rounded up]`.
    dv: Buffer,
    /// `[rows]`.
    dscores: Buffer,
    width: usize,
    rows: usize,
    /// Neither `dk`, `dv` nor `dq` is wanted: two of the five products are left.
    scores_alone: bool,
}

impl KeyGrads {
    pub(super) fn zeros(rows: usize, d: usize) -> Self {
        let width = padded(d);
        let (dk, dv) = (Buffer::zeros(rows * width), Buffer::zeros(rows * width));
        Self { dk, dv, dscores: Buffer::zeros(rows), width, rows, scores_alone: false }
    }

    /// For the gradient of the scores alone.
    pub(super) fn of_scores(rows: usize, d: usize) -> Self {
        let (dk, dv) = (Buffer::zeros(0), Buffer::zeros(0));
        Self { dk, dv, dscores: Buffer::zeros(rows), width: padded(d), rows, scores_alone: true }
    }

    /// The part of the score's gradient of row `row`; zero past the end.
    pub(super) fn dscore(&self, row: usize) -> f32 {
        if row < self.rows { self.dscores.row(row, 1)[0] } else { 0.0 }
    }

    /// Add row `row` to `dk`, `dv`; returns the part of the score's gradient. Rows past the end are zero.
    pub(super) fn add_row_to(&self, row: usize, dk: &mut [f32], dv: &mut [f32]) -> f32 {
        if row >= self.rows {
            return 0.0;
        }
        dk.iter_mut().zip(self.dk.row(row * self.width, self.width)).for_each(|(to, x)| *to += x);
        dv.iter_mut().zip(self.dv.row(row * self.width, self.width)).for_each(|(to, x)| *to += x);
        self.dscores.row(row, 1)[0]
    }
}

dispatch! {
    /// Write `dq` of the tile's queries, unless only scores want a gradient, and add to the gradients of its keys.
    ///
    /// # Safety
    /// Nobody else may touch those rows of `dq` meanwhile; the rows of the tile lie in `0..S`.
    pub(super) unsafe fn bwd_tile(x: &Inputs<'_>, y: &Adjoint<'_>, b: usize, g: usize, tile: &Tile<'_>, dq: SharedRows<'_>, grads: &mut KeyGrads, ws: &mut Workspace) =
        tile_body;
}

#[inline(always)]
unsafe fn tile_body<V: Simd, const M: usize>(
    x: &Inputs<'_>,
    y: &Adjoint<'_>,
    b: usize,
    g: usize,
    tile: &Tile<'_>,
    dq: SharedRows<'_>,
    grads: &mut KeyGrads,
    ws: &mut Workspace,
) {
    assert!(tile.rows.iter().all(|&row| (row as usize) < grads.rows), "key gradients for {} rows", grads.rows);
    let n_vectors = x.dims.group() * tile.n.div_ceil(V::LANES);
    let mut at = 0;
    while at < n_vectors {
        // SAFETY: the caller's contract, passed on; rows of keys are below `grads.rows`.
        unsafe {
            match panel_width::<V>(n_vectors - at) {
                1 => panel::<V, 1, M>(at, x, y, b, g, tile, dq, grads, ws),
                2 if V::WIDE == 2 => panel::<V, 2, ROWS_OF_TWO>(at, x, y, b, g, tile, dq, grads, ws),
                2 => panel::<V, 2, M>(at, x, y, b, g, tile, dq, grads, ws),
                _ => panel::<V, 3, M>(at, x, y, b, g, tile, dq, grads, ws),
            }
        }
        at += panel_width::<V>(n_vectors - at);
    }
}

#[inline(always)]
unsafe fn panel<V: Simd, const N: usize, const M: usize>(
    at: usize,
    x: &Inputs<'_>,
    y: &Adjoint<'_>,
    b: usize,
    g: usize,
    tile: &Tile<'_>,
    dq: SharedRows<'_>,
    grads: &mut KeyGrads,
    ws: &mut Workspace,
) {
    let d = x.dims.d;
    let width = grads.width;
    let lanes = N * V::LANES;
    let place = Place::<N>::new(at, x.dims.group(), V::LANES);
    let last = (place.query[N - 1] + V::LANES).min(tile.n) - 1;
    let (q, dqt, dout) = (ws.q.ptr(d * LANES), ws.o.ptr(d * LANES), ws.dout.ptr(d * LANES));
    let (p, dp) = (ws.p.ptr(STEP * LANES), ws.dp.ptr(STEP * LANES));
    let (q_rows, dout_rows) = (ws.q_rows.ptr(width * LANES), ws.dout_rows.ptr(width * LANES));
    let n_summed = if grads.scores_alone { 0 } else { grads.rows * width };
    let (dk, dv) = (grads.dk.ptr(n_summed), grads.dv.ptr(n_summed));
    let dscores = grads.dscores.ptr(grads.rows);

    let mut rows = place.rows(x, b, g, tile, V::LANES);
    // An lse of +1e30 makes every weight of an empty lane zero.
    let (mut lse, mut delta) = ([1e30f32; LANES], [0.0f32; LANES]);
    for (lane, at) in rows[..lanes].iter_mut().enumerate() {
        if *at == NO_ROW || y.lse[*at / d] == f32::NEG_INFINITY {
            *at = NO_ROW;
            // SAFETY: both buffers have `lanes` rows of `width` numbers.
            unsafe {
                q_rows.wrapping_add(lane * width).write_bytes(0, width);
                dout_rows.wrapping_add(lane * width).write_bytes(0, width);
            }
            continue;
        }
        lse[lane] = y.lse[*at / d] * LOG2_E;
        let (query, dout, o) = (&x.q[*at..][..d], &y.dout[*at..][..d], &y.o[*at..][..d]);
        // SAFETY: both rows have `d` numbers.
        delta[lane] = unsafe { products::dot::<V>(dout.as_ptr(), o.as_ptr(), d) };
        // SAFETY: as above; columns from `d` to `width` are zero from the beginning.
        unsafe {
            q_rows.wrapping_add(lane * width).copy_from_nonoverlapping(query.as_ptr(), d);
            dout_rows.wrapping_add(lane * width).copy_from_nonoverlapping(dout.as_ptr(), d);
        }
    }

    let mut keys = Keys::new(tile, place.query[0], last);
    let mut step = Step::new();
    let biased = !tile.masks.dbias.is_empty();
    // SAFETY: the buffers hold D, STEP or LANES rows as named; offsets of keys lie in `k` and `v` and rows below
    // `grads.rows` by the caller's contract; a row of masks has 64 numbers and `place.query + LANES <= 64`.
    unsafe {
        pack::<V, N>(&rows, x.q, d, x.dims.scale() * LOG2_E, q);
        pack::<V, N>(&rows, y.dout, d, 1.0, dout);
        for i in 0..d * N {
            V::splat(0.0).store(dqt.wrapping_add(i * V::LANES));
        }
        let lse: [V; N] = V::load_array(lse.as_ptr());
        let delta: [V; N] = V::load_array(delta.as_ptr());
        let mut unused_max = [V::splat(0.0); N];
        while keys.fill(&mut step, x, b, g) {
            let add = tile.masks.add.as_ptr();
            products::logits::<V, N, M>(
                step.n,
                step.n_plain,
                x.k.as_ptr(),
                &step.at,
                &step.mask,
                add,
                &place.query,
                d,
                q,
                p,
                &mut unused_max,
            );
            products::inner::<V, N, M>(step.n, x.v.as_ptr(), &step.at, d, dout, dp);
            for j in 0..step.n {
                let mut dscore = V::splat(0.0);
                for i in 0..N {
                    let at = j * lanes + i * V::LANES;
                    let weight = V::load(p.wrapping_add(at)).sub(lse[i]).exp2();
                    weight.store(p.wrapping_add(at));
                    let dlogit = weight.mul(V::load(dp.wrapping_add(at)).sub(delta[i]));
                    dlogit.store(dp.wrapping_add(at));
                    if biased {
                        let dbias = tile.masks.dbias.as_ptr().wrapping_add(step.mask[j] as usize * QUERIES + place.query[i]);
                        dscore = dlogit.mul_add(V::load(dbias), dscore);
                    }
                }
                if biased {
                    *dscores.wrapping_add(step.row[j] as usize) += dscore.sum();
                }
            }
            if grads.scores_alone {
                continue;
            }
            products::scatter::<V, M>(step.n, lanes, p, dout_rows, width, dv, &step.row);
            products::scatter::<V, M>(step.n, lanes, dp, q_rows, width, dk, &step.row);
            products::outer::<V, N, M>(step.n, x.k.as_ptr(), &step.at, d, dp, &[V::splat(1.0); N], dqt);
        }
        if !grads.scores_alone {
            unpack::<V, N>(&rows, dqt, d, &[x.dims.scale(); LANES], dq);
        }
    }
}
