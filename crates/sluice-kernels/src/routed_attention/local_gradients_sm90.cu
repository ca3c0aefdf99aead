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
    u64 keys_empty[SLOTS];
    int entries[SLOTS][KEYS];   // Where the sums of a tile's keys are, -1 for none.
};
static_assert(LocalShared::common + sizeof(LocalShared) == 224432, "one_pass.rs counts on this");

// dq [B, T, H, D], which holds the part of the routed keys, and dk, dv [B, T, G, D]. Grid [ceil(n_blocks / blocks_a_chunk), P], 512 threads; `rows` from
// `row_products`; `entry_of_key`, `sums`, `window` and `capacity` as in `dkv_local`.
extern "C" __global__ __launch_bounds__(512, 1) void local_gradients_sm90(const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const StepRows* rows, const int* lens,
                                                                          const int* entry_of_key, const float* sums, bf16* dq, bf16* dk, bf16* dv, int T,
                                                                          int G, int n_blocks, int window, int blocks_a_chunk, int capacity, int group,
                                                                          u32 reciprocal) {
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
    rows += (long)pair * n_blocks * group;
    if (threadIdx.x == 0) {
        init(common, 3);
        // Threads of the warpgroup whose tile it was, and warps of all, which have then computed what dq of its blocks fell to them.
        for (int i = 0; i < SLOTS; i++) barrier_init(shared_address(state.keys_empty + i), 128 + 12);
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
            // The keys of a block come with its first step.
            const auto copy_keys = [&](int tile) {
                barrier_wait(part(state.keys_empty, tile - first_tile), parity<SLOTS>(tile - first_tile) ^ 1);
                copy_64_rows(thread, slot(tile), k, slot(tile) + TILE, v, [&](int i) { return (first_at + min(tile * 64 + i, len - 1)) * G + g; });
                copy4(&state.entries[(tile - first_tile) % SLOTS][thread], entry_of_key + (long)pair * T + min(tile * 64 + thread, T - 1));
            };
            int step = 0;
#pragma unroll 1
            for (int block = begin; block < last; block++) {
#pragma unroll 1
                for (int row = block * group * ROWS; row < min((block + 1) * group * ROWS, end_row); row += ROWS, step++) {
                    const bool first = row == block * group * ROWS;
                    // What frees a tile may wait for the step before.
                    if (first && step > 0) step_is_there<0>(common, step - 1);
                    barrier_wait(part(common.rows_empty, step), parity<STAGES>(step) ^ 1);
                    for (int tile = step == 0 ? first_tile : block; first && tile <= min(block, end - 1); tile++) copy_keys(tile);
                    copy_step(thread, common, base + LocalShared::ring, x, rows, b, g, row, end_row, step);
                    if (!first) step_is_there<1>(common, step - 1);
                }
            }
            step_is_there<0>(common, step - 1);
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    const int me = warpgroup() - 1;
    // The tile of a warpgroup that a block may see, or another one that is there.
    const auto tile_of = [&](int warpgroup, int block) { return block - (block - first_tile + 3 - warpgroup) % 3; };
    const auto tile_there = [&](int warpgroup, int block) { return min(max(tile_of(warpgroup, block), first_tile), end - 1); };
    // dq of a step falls to the warpgroups in turn.
    const auto dq_of = [&](int step, int block, bool is_last) {
        if (block >= end) return;
        if (step % 3 == me) {
            dq_of_step<true>(common, base + LocalShared::dq, step, [&](Block& acc) {
#pragma unroll
                for (int i = 0; i < 3; i++) product_of_transposed(acc, base + LocalShared::ds + (step % LOCAL_DS * 3 + i) * TILE, slot(tile_there(i, block)), i);
            });
        }
        if (is_last && block - 2 >= first_tile && lane_here() == 0) barrier_arrive(part(state.keys_empty, block - 2 - first_tile));
    };
    const auto steps_of = [&](int block) { return min(group, (end_row - block * 64 * group + ROWS - 1) / ROWS); };
    // The sums of routed readers come to those of the thread's keys of a tile, from `offset` on in an entry: 0 for dk, D for dv.
    const auto add_routed = [&](Block& sum, int tile, int offset, float scale) {
        float2 routed[2][8];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int entry = state.entries[(tile - first_tile) % SLOTS][row_here() + 8 * half];
            const float* from = sums + ((long)pair * capacity + entry) * (2 * D) + offset + lane_here() % 4 * 2;
            // All are asked for before the first is used.
#pragma unroll
            for (int j = 0; j < 8; j++) routed[half][j] = entry >= 0 ? *(const float2*)(from + 8 * j) : make_float2(0.0f, 0.0f);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                sum[j][2 * half] = fmaf(sum[j][2 * half], scale, routed[half][j].x);
                sum[j][2 * half + 1] = fmaf(sum[j][2 * half + 1], scale, routed[half][j].y);
            }
        }
    };
    // A warp's 16 rows of a tile's gradients, by way of the tile of values, which nobody else reads.
    const auto store = [&](const Block& sum, int tile, bf16* to) {
        Fragments rows;
        to_fragments<64>(rows, sum);
        __syncwarp();
        fragments_to_tile(slot(tile) + TILE, rows);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = thread_here() / 32 % 4 * 16 + i * 4 + lane_here() / 8, piece = lane_here() % 8, position = tile * 64 + key;
            const uint4 x = *(const uint4*)(shared + (slot(tile) - base) + TILE + tile_at<64>(key, piece));
            if (position < len) *(uint4*)(to + ((u64)(first_at + position) * G + g) * D + piece * 8) = x;
        }
    };
    Block sum_k, sum_v;
    int step = 0;
    bool leaves = true;     // Whether the last step computed was the last to see its tile; sums begin anew behind it.
    // The block behind the last that sees a tile of this warpgroup, or whose dq is asked for.
    const int my_last = min(last, max(end, tile_of(me, end - 1) + 3));
#pragma unroll 1
    for (int block = begin; block < my_last; block++) {
        const int tile = tile_of(me, block), there = tile_there(me, block), first_seen = block * 64 - window + 1, steps_here = steps_of(block);
        const bool sees = tile >= first_tile && tile < end, asks = block < end;
        // A warpgroup that sees nothing must not read the tile of values, through which gradients may be leaving.
        const u32 k_tile = slot(there), v_tile = sees ? k_tile + TILE : k_tile;
#pragma unroll 1
        for (int i = 0; i < steps_here; i++, step++) {
            const u32 q_tile = base + LocalShared::ring + step % STAGES * (2 * TILE);
            barrier_wait(part(common.rows_full, step), parity<STAGES>(step));
            Block s, ds;
            start(s, ds, k_tile, v_tile, q_tile);
            products_wait<1>();
            if (tile == block) {
                // A key is seen by the rows of its own query and of later ones.
                const int from = (int)row_here() * group - i * ROWS - (int)lane_here() % 4 * 2;
#pragma unroll
                for (int j = 0; j < 8; j++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        if (8 * j + e < from) s[j][e] = -infinity();
                        if (8 * j + e < from + 8 * group) s[j][2 + e] = -infinity();
                    }
                }
            } else if (!sees || tile * 64 < first_seen) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    if (!sees || tile * 64 + (int)row_here() + 8 * half < first_seen) {
#pragma unroll
                        for (int j = 0; j < 8; j++) s[j][2 * half] = s[j][2 * half + 1] = -infinity();
                    }
                }
            }
            const StepRows& known = common.rows[step % STAGES];
            weigh(s, known);
            products_wait<0>();
            Fragments weights, factors;
            differentiate(weights, factors, s, ds, known);
            if (asks) {
                barrier_wait(part(common.ds_empty, step), parity<LOCAL_DS>(step) ^ 1);
                fragments_to_tile(base + LocalShared::ds + (step % LOCAL_DS * 3 + me) * TILE, factors);
                show();
                barrier_arrive(part(common.ds_full, step));
            }
            products_begin();
            product_with_rows(sum_v, weights, q_tile + TILE, !leaves);
            product_with_rows(sum_k, factors, q_tile, !leaves);
            products_commit();
            products_wait<0>();
            barrier_arrive(part(common.rows_empty, step));
            leaves = i == steps_here - 1 && (block == tile + 2 || block == last - 1);
            if (step > 0) dq_of(step - 1, i > 0 ? block : block - 1, i == 0);
            if (leaves && sees) {
                if (tile >= begin) {
                    add_routed(sum_k, tile, 0, SCALE), add_routed(sum_v, tile, D, 1.0f);
                    // Every warp has read the tile of values.
                    sync_warpgroup();
                    store(sum_k, tile, dk), store(sum_v, tile, dv);
                }
                barrier_arrive(part(state.keys_empty, tile - first_tile));
            }
        }
    }
    dq_of(step - 1, my_last - 1, true);
    // A warpgroup with nothing left to compute still says of the steps to come that it does not need their rows.
    for (int block = my_last; block < last; block++) {
        for (int i = 0; i < steps_of(block); i++, step++) {
            barrier_wait(part(common.rows_full, step), parity<STAGES>(step));
            barrier_arrive(part(common.rows_empty, step));
        }
    }
}

}  // namespace one_pass

#endif
