// Routed attention: gradients of queries, keys and values in one pass on Hopper, for heads of 64; what its two kernels share.
// Follows key_gradients.cu, which computes the same for keys everywhere.
//
// 64 keys a tile stay in place while rows of queries pass by, 64 a step, and the gradients of keys stay in registers, as in
// key_gradients.cu. But the gradients of logits also go to shared memory, where those of all tiles are a factor of the queries'
// gradient: logits and their gradients are computed once, five products instead of seven. `routed_gradients_sm90` does so
// with the routed keys of a superblock and leaves its part of dq; `local_gradients_sm90` does so with the window and ends both.
//
// Every warpgroup but the first has tiles of keys and computes. Of the first, two warps copy the rows of the steps to come and
// two store dq. Nobody waits for all others: parts of shared memory change hands through barriers that count phases, `full` when
// there is something to read and `empty` when it has been read. The gradient of a step's queries falls to the warpgroups in turn.

#if WGMMA && HEAD_DIM == 64

namespace one_pass {

constexpr int STAGES = 4;                                       // Steps whose rows are in shared memory.
constexpr float SCALE = 0.125f, SCALE2 = SCALE * LOG2E;         // Of logits, and in units of log2.

// A thread's part of 64 x 64 accumulators, and the same as factors of a product (`to_fragments`).
using Block = float[8][4];
using Fragments = u32[4][4];

// What is known of a step's rows: minus their log sums in units of log2, which are -inf for padding, and deltas.
struct StepRows {
    float log_sums[ROWS], deltas[ROWS];
};

// In shared memory, behind the tiles. Gradients of logits have room for DS steps.
template <int DS>
struct Common {
    u64 rows_full[STAGES], rows_empty[STAGES], ds_full[DS], ds_empty[DS], dq_full[2], dq_empty[2];
    __align__(16) StepRows rows[STAGES];
};

// To be called by one thread, with the number of warpgroups that compute.
template <int DS>
__device__ __forceinline__ void init(Common<DS>& common, int warpgroups) {
#pragma unroll
    for (int i = 0; i < STAGES; i++) {
        barrier_init(shared_address(common.rows_full + i), 64);
        barrier_init(shared_address(common.rows_empty + i), warpgroups * 128);
    }
#pragma unroll
    for (int i = 0; i < DS; i++) {
        barrier_init(shared_address(common.ds_full + i), warpgroups * 128);
        barrier_init(shared_address(common.ds_empty + i), 4);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        barrier_init(shared_address(common.dq_full + i), 128);
        barrier_init(shared_address(common.dq_empty + i), 64);
    }
}

// Of something that is used every N steps: where it is, and the parity of its phase.
template <int N>
__device__ __forceinline__ u32 part(const u64 (&barriers)[N], int step) { return shared_address(barriers) + step % N * 8; }
template <int N>
__device__ __forceinline__ u32 parity(int step) { return step / N & 1; }

// A thread's lane, and the first of its two rows of 64 in accumulators; the other one is 8 further down.
__device__ __forceinline__ u32 lane_here() { return thread_here() % 32; }
__device__ __forceinline__ u32 row_here() { return thread_here() / 32 % 4 * 16 + thread_here() % 32 / 4; }

__device__ __forceinline__ void sync_warpgroup() { asm volatile("bar.sync %0, 128;" ::"r"(warpgroup()) : "memory"); }

// Show the matrix unit what this thread has written.
__device__ __forceinline__ void show() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copy 64 rows of D numbers of two matrices to two tiles, by 64 threads, of which this is one; `source(i)` is the row behind row i.
template <class Source>
__device__ __forceinline__ void copy_64_rows(int thread, u32 x_tile, const bf16* x, u32 y_tile, const bf16* y, Source source) {
    const int first = thread / 8, piece = thread % 8;
    const u32 at = tile_at<64>(first, piece);
    const char *x_piece = (const char*)(x + piece * 8), *y_piece = (const char*)(y + piece * 8);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u64 from = (u64)(u32)source(first + i * 8) * (D * 2);
        copy16(x_tile + at + i * 1024, x_piece + from);
        copy16(y_tile + at + i * 1024, y_piece + from);
    }
}

// Copy the rows of a step, `row` the first of them: those of q and dout, and what is known of them from `rows`, by 64 threads.
template <int DS>
__device__ __forceinline__ void copy_step(int thread, Common<DS>& common, u32 ring, const Problem& x, const StepRows* rows, int b, int g, int row, int end, int step) {
    const u32 q_tile = ring + step % STAGES * (2 * TILE);
    copy_64_rows(thread, q_tile, x.q, q_tile + TILE, x.dout, [&](int i) { return x.group.at(b, x.T, x.G, g, min(row + i, end - 1)); });
    if (thread < 32) copy16(shared_address(common.rows + step % STAGES) + thread * 16, (const char*)(rows + row / ROWS) + thread * 16);
    copies_commit();
}

// Wait until at most N steps' copies by this thread are under way, and say that those of `step` have come: shown to the matrix unit here, so
// that nobody who computes has to.
template <int N, int DS>
__device__ __forceinline__ void step_is_there(Common<DS>& common, int step) {
    copies_wait<N>();
    barrier_arrive(part(common.rows_full, step));
}

// Logits of 64 keys (rows) and the rows of a step (columns), and behind them the products of values and dout.
__device__ __forceinline__ void start(Block& s, Block& ds, u32 k_tile, u32 v_tile, u32 q_tile) {
    products_begin();
    product_of_tiles<D, 64, 64>(s, k_tile, 0, q_tile);
    products_commit();
    product_of_tiles<D, 64, 64>(ds, v_tile, 0, q_tile + TILE);
    products_commit();
}

// Logits become weights; `add`, if any, comes to those of the thread's two keys, in units of log2.
template <class... Add>
__device__ __forceinline__ void weigh(Block& s, const StepRows& rows, const Add&... add) {
    const float2* log_sums = (const float2*)rows.log_sums + thread_here() % 4;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float2 log_sum = log_sums[4 * j];
#pragma unroll
        for (int key = 0; key < 2; key++) {
            s[j][2 * key] = exp2_fast(fmaf(s[j][2 * key], SCALE2, (log_sum.x + ... + add[key])));
            s[j][2 * key + 1] = exp2_fast(fmaf(s[j][2 * key + 1], SCALE2, (log_sum.y + ... + add[key])));
        }
    }
}

// Weights and the gradients of logits as factors of products, from weights and the products of values and dout. What these gradients are for
// either of the thread's keys, over its rows, comes to `sum`, if any.
template <class... Sum>
__device__ __forceinline__ void differentiate(Fragments& weights, Fragments& factors, const Block& p, const Block& ds, const StepRows& rows, Sum&... sum) {
    const float2* deltas = (const float2*)rows.deltas + thread_here() % 4;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float2 delta = deltas[4 * j];
#pragma unroll
        for (int key = 0; key < 2; key++) {
            const float p0 = p[j][2 * key], p1 = p[j][2 * key + 1];
            const float g0 = p0 * (ds[j][2 * key] - delta.x), g1 = p1 * (ds[j][2 * key + 1] - delta.y);
            weights[j / 2][j % 2 * 2 + key] = pack(p0, p1);
            factors[j / 2][j % 2 * 2 + key] = pack(g0, g1);
            ((sum[key] += g0 + g1), ...);
        }
    }
}

// Where in a tile of 64 rows a lane finds its row of the first four 8 x 8 matrices of a warpgroup's fragments; the next four are at `at ^ 32`.
__device__ __forceinline__ u32 fragments_at(u32 tile) {
    return tile + tile_at<64>(thread_here() / 32 % 4 * 16 + lane_here() % 16, lane_here() / 16);
}

// Write a warpgroup's fragments of 64 rows and 64 columns to a tile.
__device__ __forceinline__ void fragments_to_tile(u32 tile, const Fragments& x) {
    const u32 at = fragments_at(tile);
#pragma unroll
    for (int i = 0; i < 4; i++) store_matrices(at ^ i * 32, x[i][0], x[i][1], x[i][2], x[i][3]);
}

// acc (+)= A^T B, both tiles of 64 rows and columns; a sum begins with `add` 0.
__device__ __forceinline__ void product_of_transposed(Block& acc, u32 a, u32 b, int add) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGS32
                     ", %32, %33, p, 1, 1, 1, 1;\n}"
                     : ACC16(0), ACC16(4)
                     : "l"(describe(a, i * 2048, TILE)), "l"(describe(b, i * 2048, TILE)), "r"(i > 0 ? 1 : add));
    }
}

// acc (+)= A B: A in registers, B a tile of 64 rows and columns; a sum begins with `add` 0.
__device__ __forceinline__ void product_with_rows(Block& acc, const Fragments& a, u32 b, int add) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGS32
                     ", {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}"
                     : ACC16(0), ACC16(4)
                     : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "l"(describe(b, i * 2048, TILE)), "r"(i > 0 ? 1 : add));
    }
}

// dq of a step, by a warpgroup: wait for the gradients of its logits, `products(acc)` asks for the products with the keys, and the result goes to the
// tile from which `store_dq` takes it, `ADDED` to what is there.
template <bool ADDED, int DS, class Products>
__device__ __forceinline__ void dq_of_step(Common<DS>& common, u32 dq_tiles, int step, Products products) {
    barrier_wait(part(common.ds_full, step), parity<DS>(step));
    Block acc;
    products_begin();
    products(acc);
    products_commit();
    products_wait<0>();
    if (lane_here() == 0) barrier_arrive(part(common.ds_empty, step));
    barrier_wait(part(common.dq_empty, step), parity<2>(step) ^ !ADDED);
    const u32 tile = dq_tiles + step % 2 * TILE;
    Fragments sum;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (ADDED) load_fragments(sum[i], fragments_at(tile) ^ i * 32);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float* x = &acc[2 * i + e / 2][e % 2 * 2];
            sum[i][e] = ADDED ? pack(fmaf(x[0], SCALE, low_float(sum[i][e])), fmaf(x[1], SCALE, high_float(sum[i][e]))) : pack(x[0] * SCALE, x[1] * SCALE);
        }
    }
    fragments_to_tile(tile, sum);
    barrier_arrive(part(common.dq_full, step));
}

// `each(offset in the tile, address in dq, row)` for the pieces of a step's dq that fall to this one of 64 threads.
template <class Each>
__device__ __forceinline__ void for_dq(int thread, bf16* dq, const Problem& x, int b, int g, int row, int end, Each each) {
    const int first = thread / 8, piece = thread % 8;
    const u32 at = tile_at<64>(first, piece);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int here = row + first + i * 8;
        each(at + i * 1024, dq + (u64)x.group.at(b, x.T, x.G, g, min(here, end - 1)) * D + piece * 8, here);
    }
}

// Copy what is there of a step's dq to the tile where the rest comes to it, by 64 threads.
template <int DS>
__device__ __forceinline__ void fetch_dq(int thread, Common<DS>& common, u32 dq_tiles, bf16* dq, const Problem& x, int b, int g, int row, int end, int step) {
    for_dq(thread, dq, x, b, g, row, end, [&](u32 at, bf16* there, int) { copy16(dq_tiles + step % 2 * TILE + at, there); });
    barrier_arrive_with_copies(part(common.dq_empty, step));
}

// Store dq of a step, `row` its first, by 64 threads.
template <int DS>
__device__ __forceinline__ void store_dq(int thread, Common<DS>& common, const unsigned char* dq_tiles, bf16* dq, const Problem& x, int b, int g, int row, int end, int step) {
    barrier_wait(part(common.dq_full, step), parity<2>(step));
    for_dq(thread, dq, x, b, g, row, end, [&](u32 at, bf16* to, int here) {
        const uint4 y = *(const uint4*)(dq_tiles + step % 2 * TILE + at);
        if (here < end) *(uint4*)to = y;
    });
}

}  // namespace one_pass

// What the steps want to know of rows, `StepRows` [P, n_rows / 64] in the order of queries and, for each, of the group's heads. Grid
// [ceil(n_rows / 128), P], 256 threads.
extern "C" __global__ __launch_bounds__(256) void row_products(const bf16* dout, const bf16* o, const float* lse, const int* lens, one_pass::StepRows* rows, int T, int G,
                                                               int n_rows, int group, u32 reciprocal) {
    constexpr int AT_ONCE = 4;
    const int pair = blockIdx.y, b = pair / G, g = pair % G, end = lens[b] * group, first = blockIdx.x * 128 + threadIdx.x / 8, piece = threadIdx.x % 8;
    const Group heads = {group, reciprocal};
    uint4 xs[AT_ONCE], ys[AT_ONCE];
    float log_sums[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        const int row = first + i * 32;
        if (row < end) {
            const u32 at = heads.at(b, T, G, g, row);
            xs[i] = *(const uint4*)(dout + (u64)at * D + piece * 8), ys[i] = *(const uint4*)(o + (u64)at * D + piece * 8);
            log_sums[i] = lse[at];
        }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        const int row = first + i * 32;
        float sum = 0.0f;
        if (row < end) {
            const u32 x[4] = {xs[i].x, xs[i].y, xs[i].z, xs[i].w}, y[4] = {ys[i].x, ys[i].y, ys[i].z, ys[i].w};
#pragma unroll
            for (int e = 0; e < 4; e++) sum += low_float(x[e]) * low_float(y[e]) + high_float(x[e]) * high_float(y[e]);
        }
        sum = quad_sum(sum);
        sum += __shfl_xor_sync(0xffffffffu, sum, 4);
        if (piece == 0 && row < n_rows) {
            one_pass::StepRows& step = rows[(long)pair * (n_rows / ROWS) + row / ROWS];
            step.log_sums[row % ROWS] = row < end ? -log_sums[i] * LOG2E : -infinity(), step.deltas[row % ROWS] = row < end ? sum : 0.0f;
        }
    }
}

#endif
