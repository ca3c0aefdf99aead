// Routed attention: the gradients that the window's keys have and give, in one pass on Hopper, for heads of 64, and the ends of all gradients.
// Follows one_pass.cuh.
//
// A block of threads goes through a chunk of consecutive blocks of 64 queries. The windows of such a block lie in its own tile of 64 keys and the
// two before it. A tile stays with one of three warpgroups until no later block sees it; the next one of that warpgroup is three further on.
// Behind the chunk come up to two blocks of the next one, which see the last tiles: for the gradients of those alone, so that no two blocks of
// threads have to add.

#if WGMMA && HEAD_DIM == 64

namespace one_pass {

constexpr int LOCAL_DS = 3;     // Steps whose gradients of logits are there.
constexpr int SLOTS = 4;        // Tiles of keys in shared memory: one is on its way while three are in use.

struct LocalShared {
    static constexpr int keys = 0, ring = SLOTS * 2 * TILE, ds = ring + STAGES * 2 * TILE, dq = ds + LOCAL_DS * 3 * TILE, common = dq + 2 * TILE;
    Common<LOCAL_DS> common_part;
    u64 keys_full[SLOTS], keys_empty[SLOTS];
};
static_assert(LocalShared::common + sizeof(LocalShared) == 223440, "one_pass.rs counts on this");

// dq [B, T, H, D], which holds the part of the routed keys, and dk, dv [B, T, G, D]. Grid [ceil(n_blocks / blocks_a_chunk), P], 512 threads; `rows` from
// `row_products`; what follows `dv` as in `dkv_local`.
extern "C" __global__ __launch_bounds__(512, 1) void local_gradients_sm90(const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const float2* rows, const int* lens,
                                                                          const int* first_reader, const int* sorted, const float* sums, bf16* dq, bf16* dk,
                                                                          bf16* dv, int T, int G, int n_blocks, int window, int blocks_a_chunk, int capacity,
                                                                          int group, u32 reciprocal) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int pair = blockIdx.y, b = pair / G, g = pair % G, len = lens[b], end_row = len * group;
    const int begin = blockIdx.x * blocks_a_chunk, end = min(begin + blocks_a_chunk, n_blocks);
    // Blocks with queries, and those of them that are visited.
    const int n_valid = (len + 63) / 64, last = min(end + 2, n_valid);
    const Problem x = {dout, q, k, v, nullptr, nullptr, T, G, {group, reciprocal}};

    // Padding.
    const u32 first_at = (u32)b * T;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    for (int position = max(begin * 64, len); position < min(end * 64, T); position++) {
        for (int i = threadIdx.x; i < group * 8; i += 512) ((uint4*)(dq + (u64)(first_at + position) * (G * group * D) + g * group * D))[i] = zero;
        if (threadIdx.x < 16) ((uint4*)((threadIdx.x < 8 ? dk : dv) + ((u64)(first_at + position) * G + g) * D))[threadIdx.x % 8] = zero;
    }
    if (begin >= n_valid) return;

    const u32 base = __shfl_sync(0xffffffffu, shared_address(shared), 0);
    LocalShared& state = *(LocalShared*)(shared + LocalShared::common);
    Common<LOCAL_DS>& common = state.common_part;
    rows += (long)pair * n_blocks * 64 * group;
    if (threadIdx.x == 0) {
        init(common, 3);
        for (int i = 0; i < SLOTS; i++) barrier_init(shared_address(state.keys_full + i), 64), barrier_init(shared_address(state.keys_empty + i), 4);
    }
    __syncthreads();
    // Tiles are counted from the first that the chunk sees.
    const int first_tile = max(0, begin - 2);
    const auto slot = [&](int tile) { return base + LocalShared::keys + (tile - first_tile) % SLOTS * (2 * TILE); };

    if (warpgroup() == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        const int thread = threadIdx.x % 64;
        const int first_row = begin * 64 * group, end_of_dq = min(end * 64 * group, end_row), steps_of_dq = (end_of_dq - first_row + ROWS - 1) / ROWS;
        if (threadIdx.x >= 64) {
#pragma unroll 1
            for (int step = -2; step < steps_of_dq; step++) {
                const int row = first_row + step * ROWS;
                if (step >= 0) store_dq(thread, common, shared + LocalShared::dq, dq, x, b, g, row, end_of_dq, step);
                if (step + 2 < steps_of_dq) fetch_dq(thread, common, base + LocalShared::dq, dq, x, b, g, row + 2 * ROWS, end_of_dq, step + 2);
            }
        } else {
            int step = 0, tile = first_tile;
#pragma unroll 1
            for (int block = begin; block < last; block++) {
#pragma unroll 1
                for (; tile <= min(block, end - 1); tile++) {
                    barrier_wait(part(state.keys_empty, tile - first_tile), parity<SLOTS>(tile - first_tile) ^ 1);
                    copy_64_rows(thread, slot(tile), k, slot(tile) + TILE, v, [&](int i) { return (first_at + min(tile * 64 + i, len - 1)) * G + g; });
                    barrier_arrive_with_copies(part(state.keys_full, tile - first_tile));
                }
#pragma unroll 1
                for (int row = block * group * ROWS; row < min((block + 1) * group * ROWS, end_row); row += ROWS, step++) {
                    copy_step(thread, common, base + LocalShared::ring, x, rows, b, g, row, end_row, step);
                }
            }
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    const int me = warpgroup() - 1, lane = threadIdx.x % 32, key_of_thread = threadIdx.x / 32 % 4 * 16 + lane / 4;
    // The tile of a warpgroup that a block may see, or another one that is there.
    const auto tile_of = [&](int warpgroup, int block) { return block - (block - first_tile + 3 - warpgroup) % 3; };
    const auto tile_there = [&](int warpgroup, int block) { return min(max(tile_of(warpgroup, block), first_tile), end - 1); };
    const auto dq_of = [&](int step, int block, bool is_last) {
        dq_of_step<true>(common, base + LocalShared::dq, step, [&](Block& acc) {
#pragma unroll
            for (int i = 0; i < 3; i++) product_of_transposed(acc, base + LocalShared::ds + (step % LOCAL_DS * 3 + i) * TILE, slot(tile_there(i, block)), i);
        });
        if (is_last && block - 2 >= first_tile && lane == 0) barrier_arrive(part(state.keys_empty, block - 2 - first_tile));
    };
    Block sum_k = {}, sum_v = {};
    int step = 0, owed = -1;    // The block of the step before, if this warpgroup owes its dq.
    bool owed_last = false;
    int entry[2];
#pragma unroll 1
    for (int block = begin; block < last; block++) {
        const int tile = tile_of(me, block), key = tile * 64 + key_of_thread, first_seen = block * 64 - window + 1;
        const bool sees = tile >= first_tile && tile < end, asks = block < end;
        const int there = tile_there(me, block);
        const u32 k_tile = slot(there);
        // Who sees nothing computes weights of zero.
        const float add[2] = {!sees || key < first_seen ? -infinity() : 0.0f, !sees || key + 8 < first_seen ? -infinity() : 0.0f};
        // Where the sums of the thread's keys are, if they have any: looked up when a tile comes and asked for before it goes.
        const bool ours = sees && tile >= begin, ends = ours && (block == tile + 2 || block == last - 1);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (block == tile) {
                const int reader = ours && key + 8 * half < len ? first_reader[(long)pair * T + key + 8 * half] : -1;
                entry[half] = reader >= 0 ? sorted[(long)pair * capacity + reader] : -1;
            }
            if (ends && entry[half] >= 0) {
                asm volatile("prefetch.global.L2 [%0];" ::"l"(sums + ((long)pair * capacity + entry[half]) * (2 * D) + lane % 4 * 32));
            }
        }
        barrier_wait(part(state.keys_full, there - first_tile), parity<SLOTS>(there - first_tile));
        const int steps_here = min(group, (end_row - block * 64 * group + ROWS - 1) / ROWS);
#pragma unroll 1
        for (int i = 0; i < steps_here; i++, step++) {
            const u32 q_tile = base + LocalShared::ring + step % STAGES * (2 * TILE);
            barrier_wait(part(common.rows_full, step), parity<STAGES>(step));
            show();
            Block s, ds;
            start(s, ds, k_tile, k_tile + TILE, q_tile);
            products_wait<0>();
            if (tile == block) {
                // A key is seen by the rows of its own query and of later ones.
                const int from = key_of_thread * group - i * ROWS - lane % 4 * 2;
#pragma unroll
                for (int j = 0; j < 8; j++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        if (8 * j + e < from) s[j][e] = -infinity();
                        if (8 * j + e < from + 8 * group) s[j][2 + e] = -infinity();
                    }
                }
            }
            Fragments weights, factors;
            float unused[2];
            weigh<false>(weights, factors, s, ds, common.rows[step % STAGES], add, unused);
            if (asks) {
                barrier_wait(part(common.ds_empty, step), parity<LOCAL_DS>(step) ^ 1);
                fragments_to_tile(base + LocalShared::ds + (step % LOCAL_DS * 3 + me) * TILE, factors);
                show();
                barrier_arrive(part(common.ds_full, step));
            }
            products_begin();
            product_with_tile<64, D>(sum_v, weights, q_tile + TILE);
            product_with_tile<64, D>(sum_k, factors, q_tile);
            products_commit();
            products_wait<0>();
            barrier_arrive(part(common.rows_empty, step));
            if (owed >= 0) dq_of(step - 1, owed, owed_last);
            owed = asks && step % 3 == me ? block : -1, owed_last = i == steps_here - 1;
        }
        if (block == tile + 2 || block == last - 1) {
            // Nobody else sees the tile.
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int mine = key + 8 * half;
                if (ends && mine < len) {
                    const float* from = sums + ((long)pair * capacity + entry[half]) * (2 * D) + lane % 4 * 2;
                    const u64 to = ((u64)(first_at + mine) * G + g) * D + lane % 4 * 2;
#pragma unroll
                    for (int j = 0; j < 8; j++) {
                        const float2 of_k = entry[half] >= 0 ? *(const float2*)(from + 8 * j) : make_float2(0.0f, 0.0f);
                        const float2 of_v = entry[half] >= 0 ? *(const float2*)(from + D + 8 * j) : make_float2(0.0f, 0.0f);
                        *(u32*)(dk + to + 8 * j) = pack(fmaf(sum_k[j][2 * half], SCALE, of_k.x), fmaf(sum_k[j][2 * half + 1], SCALE, of_k.y));
                        *(u32*)(dv + to + 8 * j) = pack(sum_v[j][2 * half] + of_v.x, sum_v[j][2 * half + 1] + of_v.y);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) sum_k[j][e] = sum_v[j][e] = 0.0f;
            }
        }
    }
    if (owed >= 0) dq_of(step - 1, owed, owed_last);
}

}  // namespace one_pass

#endif
