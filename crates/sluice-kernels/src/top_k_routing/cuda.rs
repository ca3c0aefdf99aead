//! Launches of `top_k_routing.cu`.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Arg, Buffer, Gpu, KernelSource, or_raise};

use super::Budget;
use crate::launch::{launch, output, over_elements, run};
use crate::routed_attention::gpu_routing::{GpuRouting, upload_lens};

const SOURCE: KernelSource = KernelSource { name: "top_k_routing", code: include_str!("top_k_routing.cu") };

/// Threads of a block.
const THREADS: u32 = 128;

/// Candidates that shared memory holds at most, with their positions.
const MOST_CANDIDATES: usize = 27 * 1024;

/// How positions are cut into chunks, and chunks into groups.
struct Plan {
    chunk: usize,
    n_chunks: usize,
    /// Chunks of a group.
    group: usize,
    n_groups: usize,
}

impl Plan {
    /// A single group needs two launches fewer, for more candidates a block.
    #[track_caller]
    fn new(n_candidates: usize, top_k: usize) -> Self {
        let mut chunk = top_k.max(1024);
        loop {
            let n_chunks = n_candidates.div_ceil(chunk).max(1);
            let group = if (n_chunks - 1) * top_k <= 4096 { n_chunks } else { n_chunks.isqrt() };
            let n_groups = n_chunks.div_ceil(group);
            let lists = if n_chunks == 1 { 0 } else { n_groups + group };
            if chunk + top_k > MOST_CANDIDATES {
                panic!("top_k_routing on the GPU: a budget of {top_k} among {n_candidates} candidates does not fit shared memory");
            }
            if lists * top_k <= MOST_CANDIDATES {
                return Self { chunk, n_chunks, group, n_groups };
            }
            chunk *= 2;
        }
    }
}

/// Bytes of shared memory for so many candidates, whose number the kernels round up.
fn shared(n_candidates: usize) -> u32 {
    (n_candidates.next_multiple_of(4 * THREADS as usize) * 8) as u32
}

/// The routing of `scores [B, T, G]`.
#[track_caller]
pub(super) fn route(gpu: &Arc<Gpu>, scores: &Tensor, lens: &[usize], budget: &Budget) -> GpuRouting {
    let [b, t, g] = scores.dims();
    let (n_blocks, n_routed, top_k) = (budget.n_blocks(t), budget.n_routed(t), budget.top_k);
    let bytes = |n: usize, size: usize| or_raise(gpu.alloc(n * size));
    let routing = GpuRouting {
        batch: b,
        n_blocks,
        n_kv_heads: g,
        n_routed,
        window: budget.window,
        route_every: budget.route_every,
        lens: lens.to_vec(),
        never_returns: true,
        indices: bytes(b * n_blocks * g * n_routed, 4),
        tau: bytes(b * n_blocks * g, 4),
        lens_there: upload_lens(gpu, lens),
    };
    if n_routed == 0 {
        let tau = vec![f32::NEG_INFINITY; b * n_blocks * g];
        return GpuRouting { tau: or_raise(gpu.upload_slice(&tau)), ..routing };
    }
    let Plan { chunk, n_chunks, group, n_groups } = Plan::new(budget.n_candidates(n_blocks - 1), top_k);
    let int = |x: usize| Arg::I32(x as i32);
    let lists = |n: usize| bytes(b * g * n * top_k, 8);
    let run = |name, grid, candidates, args: &[Arg]| {
        // SAFETY: every buffer was made for these sizes.
        unsafe { launch(gpu, &SOURCE, name, grid, THREADS, shared(candidates), args) };
    };
    let best: Option<Buffer> = (n_chunks > 1).then(|| {
        let best = lists(n_chunks);
        let args =
            [scores.into(), (&routing.lens_there).into(), (&best).into(), int(t), int(g), int(budget.n_sink), int(top_k), int(chunk)];
        run("best_of_chunks", [n_chunks, g, b], chunk, &args);
        best
    });
    let before = best.as_ref().filter(|_| n_groups > 1).map(|best| {
        let (of_groups, before) = (lists(n_groups), lists(n_chunks));
        let args = [best.into(), (&of_groups).into(), int(n_chunks), int(group), int(top_k)];
        run("best_of_groups", [n_groups, b * g, 1], group * top_k, &args);
        let args = [best.into(), (&of_groups).into(), (&before).into(), int(group), int(n_groups), int(top_k)];
        run("best_before", [n_chunks, b * g, 1], (n_groups + group) * top_k, &args);
        before
    });
    let address = |buffer: &Option<Buffer>| buffer.as_ref().map_or(Arg::U64(0), Arg::from);
    let args = [
        scores.into(),
        (&routing.lens_there).into(),
        address(&best),
        address(&before),
        (&routing.indices).into(),
        (&routing.tau).into(),
        int(t),
        int(g),
        int(n_blocks),
        int(n_routed),
        int(budget.window),
        int(top_k),
        int(budget.route_every),
        int(budget.n_sink),
        int(chunk),
        int(n_chunks),
    ];
    let preceding = if before.is_some() { top_k } else { (n_chunks - 1) * top_k };
    run("route_blocks", [n_blocks, g, b], preceding + chunk, &args);
    routing
}

pub(super) fn with_sinks(gpu: &Arc<Gpu>, value: f32, x: &Tensor, positions: &[u32], n_sink: usize) -> Tensor {
    let [_, t, g] = x.dims();
    let positions = or_raise(gpu.upload_slice(positions));
    let mut filled = output(gpu, x.shape());
    let n = x.len();
    let args = [
        x.into(),
        (&positions).into(),
        (&mut filled).into(),
        (n as u64).into(),
        (t as u32).into(),
        (g as u32).into(),
        (n_sink as u32).into(),
        value.into(),
    ];
    // SAFETY: `positions` has one number a row, `filled` the size of `x`.
    unsafe { run(gpu, &SOURCE, "with_sinks", over_elements(n), &args) };
    filled
}
