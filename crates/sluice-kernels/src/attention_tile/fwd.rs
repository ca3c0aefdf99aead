//! Forward pass of a tile.

use std::f32::consts::{LN_2, LOG2_E};

use super::{Inputs, Keys, LANES, QUERIES, ROWS_OF_TWO, STEP, SharedRows, Step, Tile, Workspace, few, panel_width, products};
use crate::simd::{Simd, dispatch};

dispatch! {
    /// Write `o [B, T, H, D]` and `lse [B, T, H]` of the tile's queries; rows without keys are left alone.
    ///
    /// # Safety
    /// Nobody else may touch those rows of `o` and `lse` meanwhile; the rows of the tile lie in `0..S`.
    pub(super) unsafe fn fwd_tile(x: &Inputs<'_>, b: usize, g: usize, tile: &Tile<'_>, o: SharedRows<'_>, lse: SharedRows<'_>, ws: &mut Workspace) =
        tile_body;
}

#[inline(always)]
unsafe fn tile_body<V: Simd, const M: usize>(
    x: &Inputs<'_>,
    b: usize,
    g: usize,
    tile: &Tile<'_>,
    o: SharedRows<'_>,
    lse: SharedRows<'_>,
    ws: &mut Workspace,
) {
    // A panel of few queries is mostly empty lanes; from a third on it wins over one query at a time.
    if tile.n * 5 <= V::LANES * 2 && x.dims.d.is_multiple_of(V::LANES) {
        // SAFETY: the caller's contract, passed on.
        return unsafe { few::fwd::<V>(x, b, g, tile, o, lse, ws) };
    }
    let n_vectors = x.dims.group() * tile.n.div_ceil(V::LANES);
    let mut at = 0;
    while at < n_vectors {
        // SAFETY: the caller's contract, passed on.
        unsafe {
            match panel_width::<V>(n_vectors - at) {
                1 => panel::<V, 1, M>(at, x, b, g, tile, o, lse, ws),
                2 if V::WIDE == 2 => panel::<V, 2, ROWS_OF_TWO>(at, x, b, g, tile, o, lse, ws),
                2 => panel::<V, 2, M>(at, x, b, g, tile, o, lse, ws),
                _ => panel::<V, 3, M>(at, x, b, g, tile, o, lse, ws),
            }
        }
        at += panel_width::<V>(n_vectors - at);
    }
}

/// In place of a row's offset: the lane is empty.
pub(super) const NO_ROW: usize = usize::MAX;

/// Where the vectors of a panel come from.
pub(super) struct Place<const N: usize> {
    /// Head within the group.
    pub(super) head: [usize; N],
    /// First query within the tile.
    pub(super) query: [usize; N],
}

impl<const N: usize> Place<N> {
    #[inline(always)]
    pub(super) fn new(at: usize, group: usize, lanes: usize) -> Self {
        Self { head: std::array::from_fn(|i| (at + i) % group), query: std::array::from_fn(|i| (at + i) / group * lanes) }
    }

    /// Offset in `q` of every lane's row.
    #[inline(always)]
    pub(super) fn rows(&self, x: &Inputs<'_>, b: usize, g: usize, tile: &Tile<'_>, lanes: usize) -> [usize; LANES] {
        std::array::from_fn(|lane| {
            let (n, l) = (lane / lanes, lane % lanes);
            if n < N && self.query[n] + l < tile.n { x.query_at(b, tile.first + self.query[n] + l, g, self.head[n]) } else { NO_ROW }
        })
    }
}

/// Transpose rows of `from` into `to [D, N x LANES]`, times `scale`; lanes without a row become zero.
#[inline(always)]
pub(super) unsafe fn pack<V: Simd, const N: usize>(rows: &[usize], from: &[f32], d: usize, scale: f32, to: *mut f32) {
    let whole = d / V::LANES * V::LANES;
    let zeros = [0.0f32; 16];
    let (mut block, mut out) = ([zeros.as_ptr(); 16], [to; 16]);
    for n in 0..N {
        let rows = &rows[n * V::LANES..(n + 1) * V::LANES];
        let to = to.wrapping_add(n * V::LANES);
        for i in (0..whole).step_by(V::LANES) {
            for l in 0..V::LANES {
                block[l] = if rows[l] == NO_ROW { zeros.as_ptr() } else { from[rows[l]..][..d].as_ptr().wrapping_add(i) };
                out[l] = to.wrapping_add((i + l) * N * V::LANES);
            }
            // SAFETY: the rows have D numbers or are `zeros`, `to` has D x N x LANES.
            unsafe { V::transpose(&block, V::splat(scale), &out) };
        }
        for (l, &at) in rows.iter().enumerate() {
            for i in whole..d {
                let value = if at == NO_ROW { 0.0 } else { from[at + i] };
                // SAFETY: as above.
                unsafe { to.wrapping_add(i * N * V::LANES + l).write(value * scale) };
            }
        }
    }
}

/// The way back: rows of `to` become the lanes of `from [D, N x LANES]`, times `scale`, one factor for every lane.
///
/// # Safety
/// As `fwd_tile`: nobody else touches those rows.
#[inline(always)]
pub(super) unsafe fn unpack<V: Simd, const N: usize>(rows: &[usize], from: *const f32, d: usize, scale: &[f32], to: SharedRows<'_>) {
    let whole = d / V::LANES * V::LANES;
    let mut nowhere = [0.0f32; 16];
    let (mut block, mut out) = ([from; 16], [nowhere.as_mut_ptr(); 16]);
    for n in 0..N {
        let lanes = n * V::LANES..(n + 1) * V::LANES;
        let (rows, scale) = (&rows[lanes.clone()], &scale[lanes]);
        let from = from.wrapping_add(n * V::LANES);
        for i in (0..whole).step_by(V::LANES) {
            // SAFETY: the caller's contract; `from` has D x N x LANES numbers.
            unsafe {
                for l in 0..V::LANES {
                    block[l] = from.wrapping_add((i + l) * N * V::LANES);
                    out[l] = if rows[l] == NO_ROW { nowhere.as_mut_ptr() } else { to.row(rows[l], d).as_mut_ptr().wrapping_add(i) };
                }
                V::transpose(&block, V::load(scale.as_ptr()), &out);
            }
        }
        for (l, &at) in rows.iter().enumerate().filter(|&(_, &at)| at != NO_ROW) {
            for i in whole..d {
                // SAFETY: as above.
                unsafe { to.row(at, d)[i] = from.wrapping_add(i * N * V::LANES + l).read() * scale[l] };
            }
        }
    }
}

#[inline(always)]
unsafe fn panel<V: Simd, const N: usize, const M: usize>(
    at: usize,
    x: &Inputs<'_>,
    b: usize,
    g: usize,
    tile: &Tile<'_>,
    o: SharedRows<'_>,
    lse: SharedRows<'_>,
    ws: &mut Workspace,
) {
    let d = x.dims.d;
    let lanes = N * V::LANES;
    let place = Place::<N>::new(at, x.dims.group(), V::LANES);
    let mut rows = place.rows(x, b, g, tile, V::LANES);
    let (q, ot, p) = (ws.q.ptr(d * LANES), ws.o.ptr(d * LANES), ws.p.ptr(STEP * LANES));
    let last = (place.query[N - 1] + V::LANES).min(tile.n) - 1;
    let mut keys = Keys::new(tile, place.query[0], last);
    let mut step = Step::new();
    // SAFETY: the buffers hold D or STEP rows of at least `lanes` numbers; offsets of keys lie in `k` and `v` by the
    // caller's contract; a row of masks has 64 numbers and `place.query + LANES <= 64`.
    unsafe {
        // Logits in units of log2, so that the exponential is exp2.
        pack::<V, N>(&rows, x.q, d, x.dims.scale() * LOG2_E, q);
        // Finite, so that a difference with a hidden key's -inf is -inf and not NaN.
        let mut max = [V::splat(-1e30); N];
        let mut sum = [V::splat(0.0); N];
        // Nothing may be carried over from the last panel, not even multiplied by zero: it may be NaN.
        for i in 0..d * N {
            V::splat(0.0).store(ot.wrapping_add(i * V::LANES));
        }
        while keys.fill(&mut step, x, b, g) {
            let old = max;
            let add = tile.masks.add.as_ptr();
            products::logits::<V, N, M>(step.n, step.n_plain, x.k.as_ptr(), &step.at, &step.mask, add, &place.query, d, q, p, &mut max);
            let mut keep = [V::splat(0.0); N];
            for i in 0..N {
                keep[i] = old[i].sub(max[i]).exp2();
                sum[i] = sum[i].mul(keep[i]);
            }
            for j in 0..step.n {
                for i in 0..N {
                    let to = p.wrapping_add(j * lanes + i * V::LANES);
                    let weight = V::load(to).sub(max[i]).exp2();
                    weight.store(to);
                    sum[i] = sum[i].add(weight);
                }
            }
            products::outer::<V, N, M>(step.n, x.v.as_ptr(), &step.at, d, p, &keep, ot);
        }
        let (mut sums, mut maxima) = ([0.0f32; LANES], [0.0f32; LANES]);
        for i in 0..N {
            sum[i].store(sums.as_mut_ptr().wrapping_add(i * V::LANES));
            max[i].store(maxima.as_mut_ptr().wrapping_add(i * V::LANES));
        }
        let mut inverse = [0.0f32; LANES];
        for (lane, at) in rows[..lanes].iter_mut().enumerate() {
            // A sum of zero is a row without keys; NaN must go through.
            if *at == NO_ROW || sums[lane] == 0.0 {
                *at = NO_ROW;
                continue;
            }
            inverse[lane] = 1.0 / sums[lane];
            lse.row(*at / d, 1)[0] = maxima[lane] * LN_2 + sums[lane].ln();
        }
        unpack::<V, N>(&rows, ot, d, &inverse, o);
    }
    debug_assert!(last < QUERIES);
}
