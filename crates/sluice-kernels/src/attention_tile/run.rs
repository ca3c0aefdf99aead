//! Distributes the tiles of an attention over threads. Which queries form a task depends on shapes alone and
//! partial sums are added in a fixed order, so results do not depend on the number of threads.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use sluice_tensor::Tensor;

use super::bwd::{Adjoint, KeyGrads, bwd_tile};
use super::fwd::fwd_tile;
use super::{Inputs, QUERIES, SharedRows, Tile, Workspace};
use crate::routed_attention::Dims;

/// Splits a range of queries of one sequence and KV head into tiles.
pub(crate) trait Tiler: Sync {
    /// Scratch of one thread.
    type State;
    /// New scratch.
    fn state(&self) -> Self::State;
    /// Call `each` with tiles that cover the (at most 64) queries `span` of sequence `b`, in order.
    fn tiles(&self, state: &mut Self::State, b: usize, g: usize, span: Range<usize>, each: &mut dyn FnMut(&Tile<'_>));
    /// Beyond the largest row of a key that these queries see.
    fn end_row(&self, b: usize, g: usize, queries: Range<usize>) -> usize;
    /// Share of the work of a sequence of `len` queries that its first `t` queries are, as a monotonous function;
    /// only used to cut the backward pass into chunks of similar work.
    fn work_until(&self, t: usize) -> f64;
}

/// Work below which waking other threads costs more than it gains, in multiply-adds.
const SMALL: usize = 1 << 21;

/// `(o [B, T, H, D], lse [B, T, H])`; `keys_per_query` is an estimate.
pub(crate) fn fwd(
    dims: &Dims,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    lens: &[usize],
    keys_per_query: usize,
    tiler: &impl Tiler,
) -> (Tensor, Tensor) {
    let x = Inputs { dims: *dims, q: q.f32(), k: k.f32(), v: v.f32() };
    let mut o = Tensor::zeros([dims.b, dims.t, dims.h, dims.d]);
    let mut lse = Tensor::full(f32::NEG_INFINITY, [dims.b, dims.t, dims.h]);
    let (o_rows, lse_rows) = (SharedRows::new(o.f32_mut()), SharedRows::new(lse.f32_mut()));
    // The last queries of a causal sequence have most keys: begin with them.
    let mut tasks = Vec::new();
    for (b, &len) in lens.iter().enumerate() {
        for first in (0..len).step_by(QUERIES).rev() {
            tasks.extend((0..dims.g).map(|g| (b, g, first..(first + QUERIES).min(len))));
        }
    }
    let work = lens.iter().sum::<usize>() * keys_per_query * dims.h * dims.d * 2;
    for_each_task(
        tasks.len(),
        work > SMALL,
        || (Workspace::fwd(dims), tiler.state()),
        |(ws, state), i| {
            let (b, g, span) = tasks[i].clone();
            // SAFETY: no two tasks share a query of a KV head, and each writes its own rows; the callers of this
            // module have checked that rows of keys lie in `0..S`.
            tiler.tiles(state, b, g, span, &mut |tile| unsafe { fwd_tile(&x, b, g, tile, o_rows, lse_rows, ws) });
        },
    );
    (o, lse)
}

/// Gradients of the inputs.
pub(crate) struct Grads {
    /// `[B, T, H, D]`.
    pub(crate) dq: Tensor,
    /// `[B, S, G, D]`.
    pub(crate) dk: Tensor,
    /// `[B, S, G, D]`.
    pub(crate) dv: Tensor,
    /// `[B, S, G]`, zero without a bias.
    pub(crate) dscores: Tensor,
}

/// Backward pass of [`fwd`].
pub(crate) fn bwd(dims: &Dims, [dout, q, k, v, o, lse]: [&Tensor; 6], lens: &[usize], tiler: &impl Tiler) -> Grads {
    let x = Inputs { dims: *dims, q: q.f32(), k: k.f32(), v: v.f32() };
    let y = Adjoint { dout: dout.f32(), o: o.f32(), lse: lse.f32() };
    let mut dq = Tensor::zeros([dims.b, dims.t, dims.h, dims.d]);
    let dq_rows = SharedRows::new(dq.f32_mut());
    let parts = key_grads(&x, &y, lens, tiler, dq_rows, KeyGrads::zeros);
    let (dk, dv, dscores) = add_parts(dims, &parts);
    Grads { dq, dk, dv, dscores }
}

/// The gradient of the scores alone, `[B, S, G]`: for training gates while everything else is frozen.
pub(crate) fn bwd_scores(dims: &Dims, [dout, q, k, v, o, lse]: [&Tensor; 6], lens: &[usize], tiler: &impl Tiler) -> Tensor {
    let x = Inputs { dims: *dims, q: q.f32(), k: k.f32(), v: v.f32() };
    let y = Adjoint { dout: dout.f32(), o: o.f32(), lse: lse.f32() };
    let parts = key_grads(&x, &y, lens, tiler, SharedRows::new(&mut []), KeyGrads::of_scores);
    let mut dscores = Tensor::zeros([dims.b, dims.s, dims.g]);
    for (i, dscore) in dscores.f32_mut().iter_mut().enumerate() {
        let (b, row, g) = (i / (dims.g * dims.s), i / dims.g % dims.s, i % dims.g);
        *dscore = parts[b * dims.g + g].iter().map(|part| part.dscore(row)).sum();
    }
    dscores
}

/// Partial sums of every sequence and KV head, in a fixed order.
fn key_grads(
    x: &Inputs<'_>,
    y: &Adjoint<'_>,
    lens: &[usize],
    tiler: &impl Tiler,
    dq: SharedRows<'_>,
    zeros: impl Fn(usize, usize) -> KeyGrads + Sync,
) -> Vec<Vec<KeyGrads>> {
    let dims = &x.dims;
    let tasks = chunks(dims, lens, tiler);
    let done = Mutex::new(Vec::with_capacity(tasks.len()));
    for_each_task(
        tasks.len(),
        true,
        || (Workspace::bwd(dims), tiler.state()),
        |(ws, state), i| {
            let (b, g, queries) = tasks[i].clone();
            let mut grads = zeros(tiler.end_row(b, g, queries.clone()), dims.d);
            for first in queries.clone().step_by(QUERIES) {
                let span = first..(first + QUERIES).min(queries.end);
                // SAFETY: as in `fwd`.
                tiler.tiles(state, b, g, span, &mut |tile| unsafe { bwd_tile(x, y, b, g, tile, dq, &mut grads, ws) });
            }
            done.lock().expect("no task panicked").push((i, grads));
        },
    );
    let mut done = done.into_inner().expect("no task panicked");
    done.sort_by_key(|&(i, _)| i);
    let mut parts: Vec<Vec<KeyGrads>> = (0..dims.b * dims.g).map(|_| Vec::new()).collect();
    for (i, grads) in done {
        let (b, g, _) = tasks[i];
        parts[b * dims.g + g].push(grads);
    }
    parts
}

/// Ranges of queries for the backward pass, each with its own sums of key gradients: enough of them to keep
/// a few threads busy, few enough that the sums stay a small multiple of `dk` and `dv`.
fn chunks(dims: &Dims, lens: &[usize], tiler: &impl Tiler) -> Vec<(usize, usize, Range<usize>)> {
    let mut tasks = Vec::new();
    for (b, &len) in lens.iter().enumerate() {
        let n = 12usize.div_ceil(dims.b * dims.g).min(len.div_ceil(4 * QUERIES)).clamp(1, 8);
        let n_spans = len.div_ceil(QUERIES);
        let mut first = 0;
        for chunk in 1..=n {
            let share = tiler.work_until(len) * chunk as f64 / n as f64;
            let spans = (0..n_spans).take_while(|&i| chunk == n || tiler.work_until(i * QUERIES + QUERIES / 2) < share).count();
            let end = (spans * QUERIES).min(len);
            if first < end {
                tasks.extend((0..dims.g).map(|g| (b, g, first..end)));
            }
            first = end;
        }
    }
    tasks
}

/// `(dk, dv, dscores)` from the parts of every sequence and KV head.
fn add_parts(dims: &Dims, parts: &[Vec<KeyGrads>]) -> (Tensor, Tensor, Tensor) {
    let Dims { b, s, g, d, .. } = *dims;
    let (mut dk, mut dv, mut dscores) = (Tensor::zeros([b, s, g, d]), Tensor::zeros([b, s, g, d]), Tensor::zeros([b, s, g]));
    if dk.is_empty() {
        return (dk, dv, dscores);
    }
    let scale = dims.scale();
    let rows = dk.f32_mut().par_chunks_mut(d).zip(dv.f32_mut().par_chunks_mut(d)).zip(dscores.f32_mut());
    rows.with_min_len(256).enumerate().for_each(|(i, ((dk, dv), dscore))| {
        let (b, row, g) = (i / (dims.g * s), i / dims.g % s, i % dims.g);
        for part in &parts[b * dims.g + g] {
            *dscore += part.add_row_to(row, dk, dv);
        }
        dk.iter_mut().for_each(|x| *x *= scale);
    });
    (dk, dv, dscores)
}

/// `work(state, i)` for every `i` in `0..n`, handed out in order to whoever is free.
fn for_each_task<S>(n: usize, parallel: bool, new_state: impl Fn() -> S + Sync, work: impl Fn(&mut S, usize) + Sync) {
    let n_threads = if parallel { rayon::current_num_threads().min(n) } else { 1 };
    let next = AtomicUsize::new(0);
    let run = || {
        let mut state = None;
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                return;
            }
            work(state.get_or_insert_with(&new_state), i);
        }
    };
    if n_threads <= 1 {
        run();
    } else {
        rayon::scope(|scope| {
            for _ in 1..n_threads {
                scope.spawn(|_| run());
            }
            run();
        });
    }
}
