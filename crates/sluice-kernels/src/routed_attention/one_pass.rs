//! Launches of the gradients in one pass (`one_pass.cuh`).

use sluice_tensor::cuda::{Arg, or_raise};
use sluice_tensor::{DType, Tensor};

use super::RoutedGrads;
use super::cuda::{Call, KEYS, Superblocks, routed};
use crate::launch::{act, act_mut, optional};

/// Multiprocessors of the GPU for which the kernels are, where none is at hand.
pub(super) const MULTIPROCESSORS: usize = 132;

/// Places of a superblock.
const PLACES: usize = 256;

/// Whether the kernels serve this call and are faster than two passes, which a GPU wants to be filled for.
pub(super) fn serves(call: &Call<'_>) -> bool {
    let r = call.routing;
    call.gpu.arch() == "sm_90a"
        && call.dims.d == 64
        && r.route_every == KEYS
        && r.window <= 2 * KEYS + 1
        && (PLACES / 2 + 1..=PLACES).contains(&r.n_routed)
        && r.never_returns
        && r.n_blocks * call.dims.b * call.dims.g >= 4 * multiprocessors(call)
}

fn multiprocessors(call: &Call<'_>) -> usize {
    call.gpu.info().multiprocessors as usize
}

/// How many superblocks, of how many blocks at most: a block of threads, of which one fits a multiprocessor, has each. Of the spans that the
/// table of keys allows, and a bit a block, the one with the least to do; to begin and to end takes about as long as a block.
pub(super) fn superblocks(n_blocks: usize, n_routed: usize, pairs: usize, multiprocessors: usize) -> (usize, usize) {
    let most = (8192 / n_routed.max(1)).clamp(1, 32);
    (1..=(n_blocks * pairs).div_ceil(multiprocessors).max(1))
        .map(|waves| (waves * multiprocessors / pairs).clamp(1, n_blocks.max(1)))
        .map(|n| (n, n_blocks.div_ceil(n).max(1)))
        .filter(|&(_, span)| span <= most)
        .min_by_key(|&(n, span)| (n * pairs).div_ceil(multiprocessors) * (span + 1))
        .expect("superblocks of one block are among them")
}

/// All gradients. `inputs` are dout, q, k, v and o, in bf16, and lse.
pub(super) fn bwd(call: &Call<'_>, inputs: [&Tensor; 6], dtype: DType) -> RoutedGrads {
    let [dout, q, k, v, o, lse] = inputs;
    let (dims, r, int) = (call.dims, call.routing, Call::int);
    let (pairs, n_rows, lens) = (dims.b * dims.g, r.n_blocks * r.route_every * dims.group(), Arg::from(&r.lens_there));
    let rows = call.ints(2 * pairs * n_rows);
    let mut dq = call.bf16(q.shape());
    let factors = [act(dout), act(q), act(k), act(v), (&rows).into()];
    let superblocks =
        Superblocks::new(superblocks(r.n_blocks, r.n_routed, pairs, multiprocessors(call)), dims.t, r.n_blocks, r.n_routed, true);
    // What is known of rows takes bandwidth and the index of keys takes time: side by side.
    let side = or_raise(call.gpu.fork());
    let entries = routed(call, superblocks, 1, |index| {
        let args = [act(dout), act(o), lse.into(), lens, (&rows).into(), int(dims.t), int(dims.g), int(n_rows)];
        let args: Vec<Arg> = args.into_iter().chain(call.division()).collect();
        call.keys_beside(&side, "row_products", [n_rows.div_ceil(128), pairs, 1], 256, &args);
        or_raise(side.join());

        let Superblocks { span, n, capacity } = index.superblocks;
        let mut args = factors.to_vec();
        args.extend([optional(call.scores), (&r.tau).into(), lens]);
        args.extend([&index.routed_keys, &index.n_keys, &index.n_open, &index.first_entry, &index.sums, &index.score_sums].map(Arg::from));
        args.push(act_mut(&mut dq));
        args.extend([dims.t, dims.g, r.n_blocks, r.n_routed, r.route_every].map(int));
        args.push(call.inverse_temperature.into());
        args.extend([span, capacity].map(int));
        args.extend(call.division());
        call.keys("routed_gradients_sm90", [n, pairs, 1], 384, 227_504, &args);
    });

    let (mut dk, mut dv) = (call.bf16(k.shape()), call.bf16(v.shape()));
    // A block of threads a multiprocessor, with as long a chunk as that takes.
    let chunk = r.n_blocks.div_ceil((multiprocessors(call) / pairs).max(1));
    let mut args = factors.to_vec();
    args.push(lens);
    args.extend([&entries.entry_of_key, &entries.sums].map(Arg::from));
    args.extend([act_mut(&mut dq), act_mut(&mut dk), act_mut(&mut dv)]);
    args.extend([dims.t, dims.g, r.n_blocks, r.window, chunk, entries.capacity].map(int));
    args.extend(call.division());
    call.keys("local_gradients_sm90", [r.n_blocks.div_ceil(chunk), pairs, 1], 512, 224_432, &args);
    RoutedGrads { dq: dq.to_dtype(dtype), dk: dk.to_dtype(dtype), dv: dv.to_dtype(dtype), dscores: entries.dscores }
}
