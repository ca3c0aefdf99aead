//! Launches of `top_k_routing.cu`.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Arg, Buffer, Gpu, KernelSource, or_raise};

use super::Budget;
use crate::launch::{launch, output, over_elements, run};
use crate::routed_attention::Visibility;
use crate::routed_attention::gpu_routing::{GpuRouting, upload_lens};

const SOURCE: KernelSource =
    KernelSource { name: "top_k_routing", code: concat!(include_str!("k_best.cuh"), "\n", include_str!("top_k_routing.cu")) };

/// Threads of a block.
const THREADS: u32 = 512;

/// Positions that may be among the best of some block of a run, at most: `top_k`, and those that its blocks but the first add.
const CONTENDERS: usize = 1024;

/// Bytes of candidates that shared memory holds at most; the kernels have 21 KiB of their own beside them.
const MOST_BYTES: usize = 200 << 10;

/// Candidates that a block looks through without help.
const FEW_CANDIDATES: usize = 4096;

/// How positions are cut into chunks, and chunks into groups.
struct Plan {
    chunk: usize,
    n_chunks: usize,
    /// Chunks of a group.
    group: usize,
    n_groups: usize,
    /// Whether what precedes a chunk is computed once for all its blocks.
    before: bool,
}

impl Plan {
    /// The fewest launches that leave no block too many candidates.
    #[track_caller]
    fn new(n_candidates: usize, top_k: usize) -> Self {
        let one_group = |chunk: usize, before| {
            let n_chunks = n_candidates.div_ceil(chunk).max(1);
            Self { chunk, n_chunks, group: n_chunks, n_groups: 1, before }
        };
        if n_candidates <= FEW_CANDIDATES {
            return one_group(n_candidates.max(top_k), false);
        }
        let plan = one_group(top_k.max(1024), false);
        if (plan.n_chunks - 1) * top_k <= FEW_CANDIDATES && plan.bytes(top_k) <= MOST_BYTES {
            return plan;
        }
        let mut chunk = top_k.max(2048);
        loop {
            let mut plan = one_group(chunk, true);
            if (plan.n_chunks - 1) * top_k > 2 * FEW_CANDIDATES {
                plan.group = plan.n_chunks.isqrt();
                plan.n_groups = plan.n_chunks.div_ceil(plan.group);
            }
            if plan.bytes(top_k) > MOST_BYTES {
                panic!("top_k_routing on the GPU: a budget of {top_k} among {n_candidates} candidates does not fit shared memory");
            }
            if listed(plan.lists() * top_k) <= MOST_BYTES {
                return plan;
            }
            chunk *= 2;
        }
    }

    /// Lists that make up what precedes a chunk, at most.
    fn lists(&self) -> usize {
        self.n_groups - 1 + self.group
    }

    /// Shared memory of the last kernel's candidates.
    fn bytes(&self, top_k: usize) -> usize {
        listed(if self.before { top_k } else { (self.n_chunks - 1) * top_k }) + 4 * self.chunk
    }
}

/// Consecutive blocks that share most of the work: as many as leave enough to do side by side, if that is little at all.
fn blocks_of_a_run(n_blocks: usize, pairs: usize, budget: &Budget) -> usize {
    let most = if budget.top_k <= CONTENDERS / 2 { (CONTENDERS - budget.top_k) / budget.route_every } else { 1 };
    (n_blocks * pairs / 128).min(most).clamp(1, n_blocks)
}

/// Bytes of shared memory for so many candidates from lists.
fn listed(n_candidates: usize) -> usize {
    n_candidates * 8
}

/// The routing of `scores [B, T, G]`.
#[track_caller]
pub(super) fn route(gpu: &Arc<Gpu>, scores: &Tensor, lens: &[usize], budget: &Budget, visibility: Visibility) -> GpuRouting {
    let [b, t, g] = scores.dims();
    // No position is left out where there are fewer than `top_k`.
    let top_k = budget.top_k.min(t + 1);
    // `window` as `route_blocks` says.
    let (n_blocks, n_routed, n_candidates, window) = match visibility {
        Visibility::Causal => {
            let n_blocks = budget.n_blocks(t);
            (n_blocks, budget.n_routed(t), budget.n_candidates(n_blocks.saturating_sub(1)), budget.window as i64)
        }
        Visibility::Bidirectional => (1, top_k.min(t), t, 1 - t as i64),
    };
    let bytes = |n: usize, size: usize| or_raise(gpu.alloc(n * size));
    let routing = GpuRouting {
        batch: b,
        n_blocks,
        n_kv_heads: g,
        n_routed,
        window: budget.window,
        route_every: budget.route_every,
        lens: lens.to_vec(),
        visibility,
        never_returns: true,
        indices: bytes(b * n_blocks * g * n_routed, 4),
        tau: bytes(b * n_blocks * g, 4),
        lens_there: upload_lens(gpu, lens),
    };
    if n_routed == 0 {
        let tau = vec![f32::NEG_INFINITY; b * n_blocks * g];
        return GpuRouting { tau: or_raise(gpu.upload_slice(&tau)), ..routing };
    }
    let plan = Plan::new(n_candidates, top_k);
    let Plan { chunk, n_chunks, group, n_groups, .. } = plan;
    let int = |x: usize| Arg::I32(x as i32);
    let lists = |n: usize| bytes(b * g * n * top_k, 8);
    let run = |name, grid, bytes: usize, args: &[Arg]| {
        // SAFETY: every buffer was made for these sizes.
        unsafe { launch(gpu, &SOURCE, name, grid, THREADS, bytes as u32, args) };
    };
    let best: Option<Buffer> = (n_chunks > 1).then(|| {
        let best = lists(n_chunks);
        let args =
            [scores.into(), (&routing.lens_there).into(), (&best).into(), int(t), int(g), int(budget.n_sink), int(top_k), int(chunk)];
        run("best_of_chunks", [n_chunks, g, b], 4 * chunk, &args);
        best
    });
    let before = best.as_ref().filter(|_| plan.before).map(|best| {
        let (of_groups, before) = (lists(n_groups), lists(n_chunks));
        if n_groups > 1 {
            let args = [best.into(), (&of_groups).into(), int(n_chunks), int(group), int(top_k)];
            run("best_of_groups", [n_groups, b * g, 1], listed(group * top_k), &args);
        }
        let args = [best.into(), (&of_groups).into(), (&before).into(), int(group), int(n_groups), int(top_k)];
        run("best_before", [n_chunks, b * g, 1], listed(plan.lists() * top_k), &args);
        before
    });
    let blocks = blocks_of_a_run(n_blocks, b * g, budget);
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
        Arg::I32(window as i32),
        int(top_k),
        int(budget.route_every),
        int(budget.n_sink),
        int(chunk),
        int(n_chunks),
        int(blocks),
    ];
    let more = if blocks > 1 { listed(CONTENDERS) } else { 0 };
    run("route_blocks", [n_blocks.div_ceil(blocks), g, b], plan.bytes(top_k) + more, &args);
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
