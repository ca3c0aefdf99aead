// Routed attention: the gradients that routed keys have and give, in one pass on Hopper, for heads of 64. Follows one_pass.cuh.
//
// A block of threads has a superblock: its 256 places of keys stay with two warpgroups, 128 each, while its rows pass by. A key that no later
// block reads gives its place to one that comes, where a block of queries begins (routed_keys.cu with units of one block).

#if WGMMA && HEAD_DIM == 64

namespace one_pass {

constexpr int PLACES = 256;

// A place: which key it has, as a number of the superblock's list, and the one that takes over.
struct Place {
    RoutedKey ahead;    // The next key, if there is one.
    int number, next;   // -1: none.
    u32 blocks;         // That read the key, a bit for each.
    int due;            // Block from which the next one counts.
    float score, dscore;
    float add, slope;   // What the gate adds to its logits in the block at hand, -inf where that does not read it, and the derivative by the score.
};

struct RoutedShared {
    static constexpr int k = 0, v = 4 * TILE, ring = 8 * TILE, ds = ring + STAGES * 2 * TILE, dq = ds + 8 * TILE, common = dq + 2 * TILE;
    Common<2> common_part;
    Place places[PLACES];
    u32 changes;        // Blocks from which some place has another key.
    // What is needed where keys change, and takes no registers elsewhere: the list, the sums of its keys, tau of the superblock's
    // blocks, and the first row of keys.
    u32 row0;
    const RoutedKey* list;
    float *sums, *score_sums;
    const float* tau;
};
static_assert(RoutedShared::common + sizeof(RoutedShared) == 227504, "one_pass.rs counts on this");

// What a thread keeps of one of the two tiles of keys of its warpgroup.
struct KeyTile {
    Block dk, dv;
    float add[2];       // As in `Place`.
    float sum[2];       // Of the gradients of logits, over the rows of a block.
};

__device__ __forceinline__ void prefetch(const bf16* row) { asm volatile("prefetch.global.L2 [%0];" ::"l"(row)); }

// Of a superblock's rows: its part of dq [B, T, H, D], and the sums of its keys. Grid [n, P], 384 threads; `rows` from `row_products`.
extern "C" __global__ __launch_bounds__(384, 1) void routed_gradients_sm90(const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const StepRows* rows,
                                                                           const float* scores, const float* tau, const int* lens, const RoutedKey* routed_keys,
                                                                           const int* n_keys, const int* n_open, const int* first_entry, float* sums,
                                                                           float* score_sums, bf16* dq, int T, int G, int n_blocks, int n_places, int every,
                                                                           float inverse_temperature, int span, int capacity, int group, u32 reciprocal) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int superblock = blockIdx.x, pair = blockIdx.y, n = gridDim.x, b = pair / G, g = pair % G;
    const int first = first_block(superblock, n, n_blocks, span), behind = first_block(superblock + 1, n, n_blocks, span);
    const int begin_row = first * every * group, end_row = min(behind * every, lens[b]) * group;
    if (begin_row >= end_row) return;
    const int steps = (end_row - begin_row + ROWS - 1) / ROWS;
    const Problem x = {dout, q, k, v, nullptr, nullptr, T, G, {group, reciprocal}};
    const u32 base = __shfl_sync(0xffffffffu, shared_address(shared), 0);
    RoutedShared& state = *(RoutedShared*)(shared + RoutedShared::common);
    Common<2>& common = state.common_part;
    rows += (long)pair * n_blocks * every * group / ROWS;
    const int at = pair * n + superblock, n_here = n_open[at], n_all = n_keys[at];
    const RoutedKey* list = routed_keys + (long)at * span * n_places;
    if (threadIdx.x == 0) {
        if (n_here > PLACES) __trap();
        init(common, 2);
        const long entry = (long)pair * capacity + first_entry[pair * (n + 1) + superblock];
        state.changes = 0, state.row0 = (u32)b * T * G + g, state.list = list;
        state.sums = sums + entry * (2 * D), state.score_sums = score_sums + entry;
        state.tau = tau + ((long)b * n_blocks + first) * G + g;
    }
    __syncthreads();
    // Keys that come later: the blocks in which some do, and their rows into the L2 cache.
    for (int i = n_here + threadIdx.x; i < n_all; i += 384) {
        const RoutedKey key = list[i];
        atomicOr(&state.changes, key.blocks & -key.blocks);
        const u64 at = (u64)(state.row0 + key.row * G) * D;
        prefetch(k + at), prefetch(v + at);
    }
    __syncthreads();

    if (warpgroup() == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        const int thread = threadIdx.x % 64;
        if (threadIdx.x < 64) {
#pragma unroll 1
            for (int step = 0; step < steps; step++) {
                barrier_wait(part(common.rows_empty, step), parity<STAGES>(step) ^ 1);
                copy_step(thread, common, base + RoutedShared::ring, x, rows, b, g, begin_row + step * ROWS, end_row, step);
                if (step > 0) step_is_there<1>(common, step - 1);
            }
            step_is_there<0>(common, steps - 1);
        } else {
#pragma unroll 1
            for (int step = 0; step < steps; step++) {
                store_dq(thread, common, shared + RoutedShared::dq, dq, x, b, g, begin_row + step * ROWS, end_row, step);
                barrier_arrive(part(common.dq_empty, step));
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int me = warpgroup() - 1;
    const u32 k_tiles = base + RoutedShared::k, v_tiles = base + RoutedShared::v;
    // A thread's two keys of a tile.
    const auto first_place = [] { return thread_here() / 128 * 128 - 128 + row_here(); };
    const auto place_of = [&](int tile, int key) -> Place& { return state.places[first_place() + tile * 64 + key * 8]; };
    {
        // Places without a key hold that of another one, which no block reads there.
        const int thread = threadIdx.x % 128, number = me * 128 + thread;
        Place& place = state.places[number];
        const u32 row0 = state.row0;
        const RoutedKey key = number < n_here ? list[number] : RoutedKey{0, 0, -1, 0};
        place.number = number < n_here ? number : -1, place.next = key.next, place.blocks = key.blocks;
        place.due = key.next >= 0 ? key.due : 0x7fffffff;
        place.score = scores && number < n_here ? scores[row0 + key.row * G] : infinity();
        place.dscore = 0.0f;
        if (key.next >= 0) place.ahead = list[key.next];
        const auto source = [&](int i) { return n_here > 0 ? row0 + list[min(me * 128 + i, n_here - 1)].row * G : row0; };
        copy_64_rows(thread % 64, k_tiles + (me * 2 + thread / 64) * TILE, k, v_tiles + (me * 2 + thread / 64) * TILE, v, [&](int i) { return source(thread / 64 * 64 + i); });
        copies_commit();
        copies_wait<0>();
        sync_warpgroup();
    }

    KeyTile tiles[2] = {};
    // Store the sums of a tile's keys whose turn it is to leave, or of all, and begin again.
    const auto store = [&](KeyTile& tile, int number_of_tile, int block) {
#pragma unroll
        for (int key = 0; key < 2; key++) {
            Place& place = place_of(number_of_tile, key);
            if (place.due <= block && place.number >= 0) {
                float* to = state.sums + (long)place.number * (2 * D) + lane_here() % 4 * 2;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    *(float2*)(to + 8 * j) = make_float2(tile.dk[j][2 * key] * SCALE, tile.dk[j][2 * key + 1] * SCALE);
                    *(float2*)(to + D + 8 * j) = make_float2(tile.dv[j][2 * key], tile.dv[j][2 * key + 1]);
                    tile.dk[j][2 * key] = tile.dk[j][2 * key + 1] = tile.dv[j][2 * key] = tile.dv[j][2 * key + 1] = 0.0f;
                }
                if (lane_here() % 4 == 0) state.score_sums[place.number] = place.dscore, place.dscore = 0.0f;
            }
        }
    };
    // Ask for the rows of a tile's keys that come with a block.
    const auto fetch = [&](int number_of_tile, int block) {
#pragma unroll
        for (int key = 0; key < 2; key++) {
            const Place& place = place_of(number_of_tile, key);
            if (place.due != block) continue;
            const u32 row = state.row0 + place.ahead.row * G;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int piece = i * 4 + lane_here() % 4;
                const u32 to = (me * 2 + number_of_tile) * TILE + tile_at<64>((first_place() + key * 8) % 64, piece);
                copy16(k_tiles + to, k + (u64)row * D + piece * 8);
                copy16(v_tiles + to, v + (u64)row * D + piece * 8);
            }
        }
    };
    // These keys have their places from now on, and the next ones are looked up.
    const auto take = [&](int number_of_tile, int block) {
#pragma unroll
        for (int key = 0; key < 2; key++) {
            Place& place = place_of(number_of_tile, key);
            const bool due = place.due == block;
            // All four lanes of a place have read when it is due before one of them changes it.
            __syncwarp();
            if (!due || lane_here() % 4 != 0) continue;
            const RoutedKey come = place.ahead;
            if (scores) place.score = scores[state.row0 + come.row * G];
            place.number = place.next, place.next = come.next, place.blocks = come.blocks;
            place.due = come.next >= 0 ? come.due : 0x7fffffff;
            if (come.next >= 0) copy16(shared_address(&place.ahead), state.list + come.next);
        }
    };
    // What the sums of a block mean for its keys' scores.
    const auto collect = [&](KeyTile& tile, int number_of_tile) {
#pragma unroll
        for (int key = 0; key < 2; key++) {
            const float sum = quad_sum(tile.sum[key]);
            Place& place = place_of(number_of_tile, key);
            if (lane_here() % 4 == 0) place.dscore += sum * place.slope;
            tile.sum[key] = 0.0f;
        }
    };
    const auto dq_of = [&](int step) {
        dq_of_step<false>(common, base + RoutedShared::dq, step, [&](Block& acc) {
#pragma unroll
            for (int tile = 0; tile < 4; tile++) product_of_transposed(acc, base + RoutedShared::ds + (step % 2 * 4 + tile) * TILE, k_tiles + tile * TILE, tile);
        });
    };

    const int steps_a_block = every * group / ROWS;
    int block = -1, left = 0;
    bool owes = false;      // dq of the step before.
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        if (left == 0) {
            left = steps_a_block, block++;
            if (scores && block > 0) collect(tiles[0], 0), collect(tiles[1], 1);
            if (state.changes >> block & 1) {
                // Nobody may read a key that goes.
                if (owes) dq_of(step - 1), owes = false;
                if (step > 0) barrier_wait(part(common.ds_empty, step - 1), parity<2>(step - 1));
                fetch(0, block), fetch(1, block);
                store(tiles[0], 0, block), store(tiles[1], 1, block);
                __syncwarp();
                take(0, block), take(1, block);
                copies_commit();
                copies_wait<0>();
                sync_warpgroup();
            }
            // A thread finds out about one place.
            {
                Place& place = state.places[threadIdx.x - 128];
                const float threshold = scores ? state.tau[block * G] : 0.0f;
                sync_warpgroup();
                place.add = !(place.blocks >> block & 1) ? -infinity() : scores ? gate_bias(place.score, threshold, inverse_temperature) : 0.0f;
                if (scores) place.slope = gate_slope(place.score, threshold, inverse_temperature);
                sync_warpgroup();
            }
#pragma unroll
            for (int key = 0; key < 2; key++) tiles[0].add[key] = place_of(0, key).add, tiles[1].add[key] = place_of(1, key).add;
        }
        left--;
        const u32 q_tile = base + RoutedShared::ring + step % STAGES * (2 * TILE);
        barrier_wait(part(common.rows_full, step), parity<STAGES>(step));
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            Block s, ds;
            start(s, ds, k_tiles + (me * 2 + tile) * TILE, v_tiles + (me * 2 + tile) * TILE, q_tile);
            products_wait<1>();
            const StepRows& known = common.rows[step % STAGES];
            weigh(s, known, tiles[tile].add);
            products_wait<0>();
            Fragments weights, factors;
            differentiate(weights, factors, s, ds, known, tiles[tile].sum);
            if (tile == 0) barrier_wait(part(common.ds_empty, step), parity<2>(step) ^ 1);
            fragments_to_tile(base + RoutedShared::ds + (step % 2 * 4 + me * 2 + tile) * TILE, factors);
            if (tile == 1) {
                show();
                barrier_arrive(part(common.ds_full, step));
            }
            products_begin();
            product_with_tile<64, D>(tiles[tile].dv, weights, q_tile + TILE);
            product_with_tile<64, D>(tiles[tile].dk, factors, q_tile);
            products_commit();
            products_wait<0>();
            if (tile == 0 && owes) dq_of(step - 1);
        }
        barrier_arrive(part(common.rows_empty, step));
        owes = step % 2 == me;
    }
    if (owes) dq_of(steps - 1);
    if (scores) collect(tiles[0], 0), collect(tiles[1], 1);
    __syncwarp();
    store(tiles[0], 0, 0x7fffffff), store(tiles[1], 1, 0x7fffffff);
}

}  // namespace one_pass

#endif
