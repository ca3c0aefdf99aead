//! Launches of the sources beside this file. Factors of products are bf16, sums and softmax f32.

use std::sync::Arc;

use sluice_tensor::cuda::{Arg, Buffer, Gpu, KernelSource, Precision, Side, or_raise};
use sluice_tensor::{DType, Tensor};

use super::gpu_routing::GpuRouting;
use super::{Dims, GateBias, RoutedGrads, Visibility, bidirectional, one_pass};
use crate::launch::{act, act_mut, launch, optional, output};
use crate::top_k_routing::Budget;

macro_rules! source {
    ($name:literal, $head_dim:literal, $($file:literal),+) => {
        KernelSource {
            name: concat!($name, "_", $head_dim),
            code: concat!("#define HEAD_DIM ", $head_dim, "\n", include_str!("../attention_tile/tile.cuh") $(, "\n", include_str!($file))+),
        }
    };
}

/// What depends on the width of a head.
struct Width {
    attention: KernelSource,
    keys: KernelSource,
    /// Rows of a tile forward and for dq.
    rows: usize,
    /// Rows of a tile in `forward_sm90.cu`.
    rows_sm90: usize,
    head_dim: usize,
}

const WIDTH_64: Width = Width {
    attention: source!("routed_attention", 64, "routed_attention.cu", "query_gradient.cu", "forward_sm90.cu"),
    keys: source!(
        "key_gradients",
        64,
        "routed_keys.cu",
        "key_gradients.cu",
        "one_pass.cuh",
        "routed_gradients_sm90.cu",
        "local_gradients_sm90.cu"
    ),
    rows: 64,
    rows_sm90: 192,
    head_dim: 64,
};

const WIDTH_128: Width = Width {
    attention: source!("routed_attention", 128, "routed_attention.cu", "query_gradient.cu", "forward_sm90.cu", "query_gradient_sm90.cu"),
    keys: source!("key_gradients", 128, "routed_keys.cu", "key_gradients.cu"),
    rows: 128,
    rows_sm90: 128,
    head_dim: 128,
};

impl Width {
    #[track_caller]
    fn of(dims: &Dims) -> &'static Self {
        match dims.d {
            64 => &WIDTH_64,
            128 => &WIDTH_128,
            d => panic!("routed attention on the GPU serves heads of 64 and 128, found {d}"),
        }
    }

    /// Threads of a block, forward and for dq: a warpgroup has 64 rows.
    fn threads(&self) -> u32 {
        2 * self.rows as u32
    }

    /// Bytes of so many rows in shared memory.
    fn tile(&self, rows: usize) -> usize {
        rows * self.head_dim * 2
    }
}

/// Keys of a step, places of a tile in `routed_keys.cu`, and rows of a step in `key_gradients.cu` and `one_pass.cuh`.
pub(super) const KEYS: usize = 64;

/// One call: sizes, routing, bias and what all kernels want to know of them.
pub(super) struct Call<'a> {
    pub(super) gpu: &'a Arc<Gpu>,
    width: &'static Width,
    pub(super) dims: &'a Dims,
    pub(super) routing: &'a GpuRouting,
    pub(super) scores: Option<&'a Tensor>,
    pub(super) inverse_temperature: f32,
}

impl<'a> Call<'a> {
    #[track_caller]
    fn new(gpu: &'a Arc<Gpu>, dims: &'a Dims, bias: Option<GateBias<'a>>, routing: &'a GpuRouting, dtype: DType) -> Self {
        assert!(
            gpu.precision() == Precision::Bf16 || dtype == DType::Bf16,
            "routed attention on the GPU rounds its factors to bf16, which precision {} does not allow",
            gpu.precision().name()
        );
        assert!(routing.visibility == Visibility::Causal, "bidirectional routed attention on the GPU has no backward pass");
        assert_eq!(dims.t, dims.s, "routed attention on the GPU: {} queries and {} keys", dims.t, dims.s);
        // Rows are numbered in 32 bits, and divided by the group with a reciprocal that is exact up to here.
        let group = dims.group();
        assert!(
            dims.b * dims.t * dims.h < 1 << 32 && dims.t * group * group < 1 << 31,
            "routed attention on the GPU: {dims:?} is too large"
        );
        Self {
            gpu,
            width: Width::of(dims),
            dims,
            routing,
            scores: bias.map(|bias| bias.scores),
            inverse_temperature: bias.map_or(1.0, |bias| 1.0 / bias.temperature),
        }
    }

    /// Query heads of a KV head, and the reciprocal by which the kernels divide.
    pub(super) fn division(&self) -> [Arg; 2] {
        let group = self.dims.group() as u64;
        [Arg::I32(group as i32), Arg::U32(if group > 1 { ((1u64 << 32) / group + 1) as u32 } else { 0 })]
    }

    pub(super) fn int(x: usize) -> Arg {
        Arg::I32(x as i32)
    }

    pub(super) fn bf16(&self, shape: &[usize]) -> Tensor {
        Tensor::empty_on(self.gpu, shape, DType::Bf16)
    }

    pub(super) fn ints(&self, n: usize) -> Buffer {
        or_raise(self.gpu.alloc(n * 4))
    }

    /// A kernel with tiles of rows.
    fn by_rows(&self, name: &str, row_tiles: usize, key_tiles: usize, args: &[Arg]) {
        let (width, r) = (self.width, self.routing);
        let Dims { b, g, .. } = *self.dims;
        let grid = [self.tiles_of_rows(), g, b];
        let shared = row_tiles * width.tile(width.rows) + key_tiles * width.tile(KEYS) + 8 * r.n_routed;
        let args: Vec<Arg> = args.iter().copied().chain(self.sizes()).collect();
        // SAFETY: shapes were checked by the caller; the routing's rows are positions below its lengths.
        unsafe { launch(self.gpu, &width.attention, name, grid, width.threads(), shared as u32, &args) };
    }

    /// `routed_attention_fwd_sm90`, which takes blocks of queries whose rows fill its tiles.
    fn fwd_sm90(&self, args: &[Arg]) {
        let (width, Dims { b, g, .. }) = (self.width, *self.dims);
        let grid = [self.routing.n_blocks * (self.rows_of_block() / width.rows_sm90), g, b];
        // Tiles of q; for some steps a tile of keys and one of values, two barriers, and biases.
        let steps = if width.head_dim == 64 { 4 } else { 2 };
        let shared = width.tile(width.rows_sm90) + steps * (2 * width.tile(KEYS) + 16 + 4 * KEYS);
        let args: Vec<Arg> = args.iter().copied().chain(self.sizes()).collect();
        let threads = 2 * width.rows_sm90 as u32;
        // SAFETY: as above.
        unsafe { launch(self.gpu, &width.attention, "routed_attention_fwd_sm90", grid, threads, shared as u32, &args) };
    }

    /// `routed_attention_dq_sm90`: a block of threads stays on every multiprocessor.
    fn dq_sm90(&self, args: &[Arg]) {
        let (width, Dims { b, g, .. }) = (self.width, *self.dims);
        let n_tiles = self.tiles_of_rows() * g * b;
        let grid = [n_tiles.min(self.gpu.info().multiprocessors as usize), 1, 1];
        // Two tiles of q and of dout, three of keys and of values, and `Shared`.
        let shared = 4 * width.tile(width.rows) + 6 * width.tile(KEYS) + 2904;
        let args: Vec<Arg> = args.iter().copied().chain(self.sizes()).chain([Self::int(n_tiles)]).collect();
        // SAFETY: as above.
        unsafe { launch(self.gpu, &width.attention, "routed_attention_dq_sm90", grid, 128 + width.threads(), shared as u32, &args) };
    }

    /// Tiles of rows of a KV head.
    fn tiles_of_rows(&self) -> usize {
        self.routing.n_blocks * self.rows_of_block().div_ceil(self.width.rows)
    }

    /// Rows of a block of queries and a KV head.
    fn rows_of_block(&self) -> usize {
        self.routing.route_every * self.dims.group()
    }

    /// The numbers at the end of a kernel with tiles of rows.
    fn sizes(&self) -> impl Iterator<Item = Arg> {
        let r = self.routing;
        let sizes = [self.dims.t, self.dims.g, r.n_blocks, r.n_routed, r.window, r.route_every].map(Self::int);
        sizes.into_iter().chain([self.inverse_temperature.into()]).chain(self.division())
    }

    /// [`Self::keys`] without shared memory of its own, beside the compute stream.
    pub(super) fn keys_beside(&self, side: &Side<'_>, name: &str, grid: [usize; 3], threads: u32, args: &[Arg]) {
        let function = or_raise(self.gpu.function(&self.width.keys, name));
        // SAFETY: as above; who calls joins before the buffers are used again or freed.
        or_raise(unsafe { side.launch(function, grid.map(|x| x as u32), [threads, 1, 1], 0, args) });
    }

    pub(super) fn keys(&self, name: &str, grid: [usize; 3], threads: u32, shared: usize, args: &[Arg]) {
        // SAFETY: as above; buffers were made for these sizes.
        unsafe { launch(self.gpu, &self.width.keys, name, grid, threads, shared as u32, args) };
    }

    /// Shared memory of a kernel with 64 keys in place: two tiles of keys, two times two of rows, and what is known of those.
    fn key_shared(&self) -> usize {
        6 * self.width.tile(KEYS) + 2 * 4 * 64 * 4
    }
}

/// `(o [B, T, H, D], lse [B, T, H])`; `o` in the format of `q`.
#[track_caller]
pub(super) fn fwd(
    gpu: &Arc<Gpu>,
    dims: &Dims,
    [q, k, v]: [&Tensor; 3],
    bias: Option<GateBias<'_>>,
    routing: &GpuRouting,
) -> (Tensor, Tensor) {
    if routing.visibility == Visibility::Bidirectional {
        assert!(bias.is_none(), "bidirectional routed attention on the GPU serves no gate bias");
        return bidirectional::fwd(gpu, dims, [q, k, v], routing);
    }
    let call = Call::new(gpu, dims, bias, routing, q.dtype());
    let (mut o, mut lse) = (call.bf16(q.shape()), output(gpu, &q.shape()[..3]));
    let [q16, k16, v16] = [q, k, v].map(|x| x.to_dtype(DType::Bf16));
    let args = [
        act(&q16),
        act(&k16),
        act(&v16),
        optional(call.scores),
        (&routing.indices).into(),
        (&routing.tau).into(),
        (&routing.lens_there).into(),
        act_mut(&mut o),
        (&mut lse).into(),
    ];
    if gpu.arch() == "sm_90a" && call.rows_of_block().is_multiple_of(call.width.rows_sm90) {
        call.fwd_sm90(&args);
    } else {
        call.by_rows("routed_attention_fwd", 1, 4, &args);
    }
    (o.to_dtype(q.dtype()), lse)
}

/// All gradients, those of tensors in the format of `q`. `inputs` are dout, q, k, v, o and lse.
#[track_caller]
pub(super) fn bwd(gpu: &Arc<Gpu>, dims: &Dims, inputs: [&Tensor; 6], bias: Option<GateBias<'_>>, routing: &GpuRouting) -> RoutedGrads {
    let dtype = inputs[1].dtype();
    let call = Call::new(gpu, dims, bias, routing, dtype);
    let [dout, q, k, v, o] = [0, 1, 2, 3, 4].map(|i| inputs[i].to_dtype(DType::Bf16));
    let lse = inputs[5];
    if one_pass::serves(&call) {
        return one_pass::bwd(&call, [&dout, &q, &k, &v, &o, lse], dtype);
    }
    let (mut dq, mut delta) = (call.bf16(q.shape()), output(gpu, lse.shape()));
    let args = [
        act(&dout),
        act(&q),
        act(&k),
        act(&v),
        act(&o),
        lse.into(),
        optional(call.scores),
        (&routing.indices).into(),
        (&routing.tau).into(),
        (&routing.lens_there).into(),
        act_mut(&mut dq),
        (&mut delta).into(),
    ];
    if dims.d == 128 && gpu.arch() == "sm_90a" {
        call.dq_sm90(&args);
    } else {
        call.by_rows("routed_attention_dq", 2, 5, &args);
    }
    let rows: [Arg; 6] = [act(&dout), act(&q), act(&k), act(&v), lse.into(), (&delta).into()];
    let entries = (routing.n_routed > 0).then(|| routed_apart(&call, &rows));
    let dscores = bias.map(|_| match &entries {
        Some(entries) => entries.dscores.clone().expect("there is a bias"),
        None => Tensor::zeros_on(&q.device(), [dims.b, dims.s, dims.g]),
    });
    let (mut dk, mut dv) = (call.bf16(k.shape()), call.bf16(v.shape()));
    let address = |buffer: Option<&Buffer>| buffer.map_or(Arg::U64(0), Arg::from);
    let int = Call::int;
    let args: Vec<Arg> = rows
        .into_iter()
        .chain([
            (&routing.lens_there).into(),
            address(entries.as_ref().map(|e| &e.entry_of_key)),
            address(entries.as_ref().map(|e| &e.sums)),
            act_mut(&mut dk),
            act_mut(&mut dv),
        ])
        .chain([dims.t, dims.g, routing.window, routing.route_every, entries.as_ref().map_or(0, |e| e.capacity)].map(int))
        .chain(call.division())
        .collect();
    call.keys("dkv_local", [dims.t.div_ceil(KEYS), dims.g, dims.b], 128, call.key_shared(), &args);
    RoutedGrads { dq: dq.to_dtype(dtype), dk: dk.to_dtype(dtype), dv: dv.to_dtype(dtype), dscores }
}

/// What the readers of routed keys contributed, added up, and the entry that has the sums of a key.
pub(super) struct Entries {
    pub(super) entry_of_key: Buffer,
    pub(super) sums: Buffer,
    pub(super) capacity: usize,
    pub(super) dscores: Option<Tensor>,
}

/// Routed keys by superblocks, and where their sums go.
pub(super) struct Index {
    pub(super) superblocks: Superblocks,
    pub(super) routed_keys: Buffer,
    pub(super) n_keys: Buffer,
    pub(super) n_open: Buffer,
    pub(super) first_entry: Buffer,
    first_tile: Buffer,
    pub(super) sums: Buffer,
    pub(super) score_sums: Buffer,
}

/// The sums of routed keys: `visit` queues the kernel that leaves one for every key of a superblock. A key can take the place of another
/// wherever a unit of so many blocks begins.
pub(super) fn routed(call: &Call<'_>, superblocks: Superblocks, unit: usize, visit: impl FnOnce(&Index)) -> Entries {
    let Dims { b, t, g, d, .. } = *call.dims;
    let GpuRouting { n_blocks, n_routed, route_every, .. } = *call.routing;
    let (pairs, int) = (b * g, Call::int);
    let Superblocks { span, n, capacity } = superblocks;
    let slots = (2 * span * n_routed).next_power_of_two().max(256);

    let routed_keys = call.ints(pairs * n * span * n_routed * 4);
    let [n_keys, n_open, n_listed] = [pairs * n, pairs * n, pairs].map(|n| call.ints(n));
    let [first_entry, first_tile] = [0; 2].map(|_| call.ints(pairs * (n + 1)));
    let [readers, first_reader, next_reader] = [0; 3].map(|_| call.ints(pairs * t));
    let [entries, sorted, score_sums] = [0; 3].map(|_| call.ints(pairs * capacity));
    let sums = call.ints(pairs * capacity * 2 * d);
    or_raise(call.gpu.fill_bytes(&readers, 0));

    let (grid, lens) = ([n, g, b], Arg::from(&call.routing.lens_there));
    let mut args: Vec<Arg> = vec![(&call.routing.indices).into(), lens];
    args.extend([&routed_keys, &n_keys, &n_open, &readers, &n_listed].map(Arg::from));
    args.extend([t, g, n_blocks, n_routed, route_every, span, unit, slots].map(int));
    call.keys("superblock_keys", grid, 512, slots * 8 + span * n_routed * 4, &args);

    let mut args: Vec<Arg> =
        [&n_keys, &n_open, &readers, &first_entry, &first_tile, &first_reader, &next_reader, &n_listed].map(Arg::from).into();
    args.extend([t, n, capacity].map(int));
    call.keys("place_entries", [t.div_ceil(4096), pairs, 1], 1024, 0, &args);

    let mut args: Vec<Arg> = [&routed_keys, &n_keys, &first_entry, &next_reader, &entries].map(Arg::from).into();
    args.extend([t, g, n_routed, span, capacity].map(int));
    call.keys("list_entries", grid, 256, 0, &args);

    let index = Index { superblocks, routed_keys, n_keys, n_open, first_entry, first_tile, sums, score_sums };
    visit(&index);

    let Index { sums, score_sums, .. } = index;
    let mut dscores = call.scores.map(|scores| output(call.gpu, scores.shape()));
    let mut args: Vec<Arg> = [&readers, &first_reader, &entries, &sorted, &sums, &score_sums].map(Arg::from).into();
    args.push(dscores.as_mut().map_or(Arg::U64(0), Arg::from));
    args.extend([t, g, capacity].map(int));
    call.keys("sum_entries", [t.div_ceil(64), g, b], 256, 0, &args);
    Entries { entry_of_key: first_reader, sums, capacity, dscores }
}

/// The sums of routed keys by a kernel for them alone; `rows` are the addresses of dout, q, k, v, lse and delta.
fn routed_apart(call: &Call<'_>, rows: &[Arg; 6]) -> Entries {
    let Dims { b, t, g, .. } = *call.dims;
    let GpuRouting { n_blocks, n_routed, route_every, never_returns, .. } = *call.routing;
    let (pairs, int) = (b * g, Call::int);
    let superblocks = Superblocks::new(superblocks(n_blocks, n_routed, route_every, pairs), t, n_blocks, n_routed, never_returns);
    let Superblocks { span, n, capacity } = superblocks;
    // Blocks between which steps begin: there a key can take the place of another. That saves a tile of places or two, which
    // costs more than it wins if as many waves of blocks of threads are left, two on a multiprocessor.
    let tiles = n_routed.div_ceil(KEYS);
    let waves = |tiles: usize| (n * pairs * tiles).div_ceil(2 * call.gpu.info().multiprocessors as usize);
    let unit = if waves(tiles) < waves(tiles + 1) { KEYS / greatest_common_divisor(KEYS, route_every * call.dims.group()) } else { span };
    routed(call, superblocks, unit, |index| {
        let mut args: Vec<Arg> = rows.to_vec();
        args.extend([optional(call.scores), (&call.routing.tau).into(), (&call.routing.lens_there).into()]);
        args.extend(
            [&index.routed_keys, &index.n_open, &index.first_entry, &index.first_tile, &index.sums, &index.score_sums].map(Arg::from),
        );
        args.extend([t, g, n_blocks, n_routed, route_every].map(int));
        args.push(call.inverse_temperature.into());
        args.extend([span, unit, n, capacity].map(int));
        args.extend(call.division());
        // A block of threads for every tile, or some too many where more places may be open than a block has keys; what is known
        // of places takes 24 bytes each.
        let grid = [n * if unit == 1 { tiles } else { 2 * tiles }, pairs, 1];
        call.keys("dkv_routed", grid, 128, call.key_shared() + KEYS * 24, &args);
    })
}

/// How the readers of routed keys are divided.
#[derive(Clone, Copy)]
pub(super) struct Superblocks {
    /// Blocks of a superblock at most; which it has says `first_block` in `routed_keys.cu`.
    pub(super) span: usize,
    /// Superblocks of a sequence.
    pub(super) n: usize,
    /// Most entries of a key in a superblock, all together.
    pub(super) capacity: usize,
}

impl Superblocks {
    /// `n` superblocks of `span` blocks hold all.
    pub(super) fn new((n, span): (usize, usize), t: usize, n_blocks: usize, n_routed: usize, never_returns: bool) -> Self {
        // A key that never returns enters once at most, beside those that are there when a superblock begins.
        let at_most = if never_returns { t + n * n_routed } else { usize::MAX };
        Self { span, n, capacity: at_most.min(n_blocks * n_routed) }
    }
}

/// Bytes that the gradients of routed keys need at most for a routing by top-k, beside their inputs, their results and a few numbers a query.
pub(super) fn scratch_bytes([b, t, g, d]: [usize; 4], budget: &Budget) -> usize {
    let (n_blocks, n_routed, pairs) = (budget.n_blocks(t), budget.n_routed(t), b * g);
    let bytes = |superblocks| {
        let Superblocks { span, n, capacity } = Superblocks::new(superblocks, t, n_blocks, n_routed, true);
        4 * pairs * (capacity * (2 * d + 3) + 4 * n * span * n_routed + 3 * t)
    };
    let apart = bytes(superblocks(n_blocks, n_routed, budget.route_every, pairs));
    if d == 64 { apart.max(bytes(one_pass::superblocks(n_blocks, n_routed, pairs, one_pass::MULTIPROCESSORS))) } else { apart }
}

/// How many superblocks, of how many blocks at most: long ones leave fewer partial sums, short ones more to do side by side; a bit a
/// block, and the table of its keys must fit shared memory.
fn superblocks(n_blocks: usize, n_routed: usize, route_every: usize, pairs: usize) -> (usize, usize) {
    let mut span = 32;
    while span > 1 {
        let table = if span > 8 { 4096 } else { 8192 };
        let enough = if span * route_every <= 512 { 48 } else { 128 };
        if span * n_routed <= table && n_blocks.div_ceil(span) * pairs >= enough {
            break;
        }
        span /= 2;
    }
    (n_blocks.div_ceil(span), span)
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}
