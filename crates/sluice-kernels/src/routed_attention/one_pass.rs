//! Launches of the gradients in one pass (`one_pass.cuh`).

use sluice_tensor::cuda::Arg;
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

/// Blocks of a superblock: a block of threads, of which one fits a multiprocessor, has each. Of the spans that the table of keys
/// allows, and a bit a block, the one with the least to do; to begin and to end takes about as long as a block.
pub(super) fn span(n_blocks: usize, n_routed: usize, pairs: usize, multiprocessors: usize) -> usize {
    let most = (8192 / n_routed.max(1)).clamp(1, 32);
    let time = |span: usize| (n_blocks.div_ceil(span) * pairs).div_ceil(multiprocessors) * (span + 1);
    (1..=most).rev().min_by_key(|&span| time(span)).expect("there are some")
}

/// All gradients. `inputs` are dout, q, k, v and o, in bf16, and lse.
pub(super) fn bwd(call: &Call<'_>, inputs: [&Tensor; 6], dtype: DType) -> RoutedGrads {
    let [dout, q, k, v, o, lse] = inputs;
    let (dims, r, int) = (call.dims, call.routing, Call::int);
    let (pairs, n_rows, lens) = (dims.b * dims.g, r.n_blocks * r.route_every * dims.group(), Arg::from(&r.lens_there));
    let rows = call.ints(2 * pairs * n_rows);
    let args = [act(dout), act(o), lse.into(), lens, (&rows).into(), int(dims.t), int(dims.g), int(n_rows)];
    let args: Vec<Arg> = args.into_iter().chain(call.division()).collect();
    call.keys("row_products", [n_rows.div_ceil(128), pairs, 1], 256, 0, &args);

    let mut dq = call.bf16(q.shape());
    let factors = [act(dout), act(q), act(k), act(v), (&rows).into()];
    let span = span(r.n_blocks, r.n_routed, pairs, multiprocessors(call));
    let superblocks = Superblocks::new(span, dims.t, r.n_blocks, r.n_routed, true);
    let entries = routed(call, superblocks, 1, |index| {
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
    args.extend([&entries.first_reader, &entries.sorted, &entries.sums].map(Arg::from));
    args.extend([act_mut(&mut dq), act_mut(&mut dk), act_mut(&mut dv)]);
    args.extend([dims.t, dims.g, r.n_blocks, r.window, chunk, entries.capacity].map(int));
    args.extend(call.division());
    call.keys("local_gradients_sm90", [r.n_blocks.div_ceil(chunk), pairs, 1], 512, 223_440, &args);
    RoutedGrads { dq: dq.to_dtype(dtype), dk: dk.to_dtype(dtype), dv: dv.to_dtype(dtype), dscores: entries.dscores }
}
