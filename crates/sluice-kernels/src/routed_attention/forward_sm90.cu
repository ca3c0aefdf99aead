// Routed attention by blocks of queries: the forward pass on Hopper where the rows of a block of queries fill whole tiles of
// 192 (heads of 64) or 128 (heads of 128). Follows routed_attention.cu, which computes the same everywhere.
//
// Warpgroups of 64 rows read tiles of keys that come once for all of them. They take turns in asking for copies; barriers
// say which tiles are there and which are free, so one may be a step ahead of another. Two blocks of threads fit a
// multiprocessor; for heads of 64 that leaves 80 registers a thread, so a thread has the logits of 32 keys at once.
//
// Local keys come first: where they are is known without the list, of which a step reads its part when it asks for copies.
// The largest logit of a row's first keys stands for that of all. A sum of weights that grows too large says that it does
// not, and then the block of threads begins again with maxima that follow.
//
// Grid: x = n_blocks * tiles of a block, y = KV heads, z = batch.

#if WGMMA

namespace forward {

constexpr int WARPGROUPS = D == 64 ? 3 : 2, ROWS = WARPGROUPS * 64, THREADS = WARPGROUPS * 128;
constexpr int STAGES = D == 64 ? 4 : 2, AHEAD = STAGES / 2;     // Steps whose tiles are there at once; how far ahead copies are asked for.
constexpr int COLUMNS = D == 64 ? 32 : 64;                      // Keys whose logits a thread holds.
constexpr int TILE = 64 * D * 2, PIECES = D / 8, STRIDE = 128 / PIECES, COPIES = KEYS / STRIDE;
constexpr float LARGEST_SUM = 1.8446744e19f;  // 2^64.

// Offsets in shared memory; cuda.rs knows the size. Tiles of keys and of values take turns.
struct Shared {
    static constexpr int q = 0, ring = q + WARPGROUPS * TILE, full = ring + STAGES * 2 * TILE, empty = full + STAGES * 8, bias = empty + STAGES * 8;
};

__device__ __forceinline__ void warpgroup_sync(int warpgroup) { asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory"); }

// A value that all threads of a warp have, in a form in which the compiler knows it: what follows from it is computed once
// for the warp.
__device__ __forceinline__ int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }

__device__ __forceinline__ float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Routed keys of a block: the first -1 of the list ends it.
__device__ __forceinline__ int routed_of_block(const int* list, int most) {
    if (list[most - 1] >= 0) return most;
    int n = 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < most; i += 32) n += list[i] >= 0;
    return __reduce_add_sync(0xffffffffu, n);
}

// As in `list_keys`.
__device__ __forceinline__ float gate_bias(float score, float tau, float inverse_temperature) {
    const float x = (score - tau) * inverse_temperature;
    const float beta = fminf(x, 0.0f) - log1pf(expf(-fabsf(x)));
    return score == infinity() || tau == -infinity() ? 0.0f : beta * sqrtf((float)D);
}

// As `place`.
__device__ __forceinline__ Place place_here(const int* lens, int T, int every, Group group) {
    Place p;
    // Most blocks of queries have one tile, and a division takes long.
    const int tiles = every * group.n / ROWS, block = tiles == 1 ? blockIdx.x : blockIdx.x / tiles;
    const int tile = (blockIdx.x - block * tiles) * ROWS, len = same_in_warp(lens[blockIdx.z]);
    p.group = group;
    p.block = block, p.g = blockIdx.y, p.b = blockIdx.z;
    p.begin = p.block * every;
    p.first_row = p.begin * group.n + tile;
    p.n_padded = min(ROWS, min(every, T - p.begin) * group.n - tile);
    p.n_rows = min(ROWS, min(every, len - p.begin) * group.n - tile);
    return p;
}

// As `routed_attention_fwd`.
extern "C" __global__ __launch_bounds__(THREADS, 2) void routed_attention_fwd_sm90(
    const bf16* q, const bf16* k, const bf16* v, const float* scores, const int* indices, const float* tau, const int* lens, bf16* o, float* lse, int T, int G,
    int n_blocks, int n_places, int window, int every, float inverse_temperature, int group, u32 reciprocal) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const Place p = place_here(lens, T, every, {group, reciprocal});
    if (p.n_padded <= 0) return;
    // Offset of a row of the tile in [B, T, H].
    const u32 first_at = ((u32)p.b * T * G + p.g) * group + p.first_row, between = (G - 1) * group;
    const auto at = [&](int row) { return first_at + row + p.query(row) * between; };
    const auto clear_padding = [&] {
        for (int i = max(0, p.n_rows) * PIECES + threadIdx.x; i < p.n_padded * PIECES; i += THREADS) {
            *(uint4*)(o + (u64)at(i / PIECES) * D + i % PIECES * 8) = make_uint4(0, 0, 0, 0);
        }
        for (int i = max(0, p.n_rows) + threadIdx.x; i < p.n_padded; i += THREADS) lse[at(i)] = -infinity();
    };
    if (p.n_rows <= 0) {
        clear_padding();
        return;
    }
    const int me = warpgroup();
    const u32 base = same_in_warp(shared_address(shared)), q_tile = base + Shared::q + me * TILE, ring = base + Shared::ring, full = base + Shared::full,
              empty = base + Shared::empty;
    float* biases = (float*)(shared + Shared::bias);
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) barrier_init(full + i * 8, scores ? 256 : 128), barrier_init(empty + i * 8, THREADS / 32);
    }
    __syncthreads();

    // Steps over local keys, then those over routed ones, which all lie before.
    const int first_local = max(0, p.begin - window + 1), last = p.query(p.n_rows - 1);
    const int n_local = (last - first_local + KEYS) / KEYS, most_routed = min(n_places, first_local), steps = n_local + (most_routed + KEYS - 1) / KEYS;
    const int at_block = (p.b * n_blocks + p.block) * G + p.g;
    const int* list = indices + (long)at_block * n_places;
    const u32 first_key = (u32)p.b * T * G + p.g;
    // Ask for a step's tiles, by one warpgroup.
    const auto fetch = [&](int step, int stage, u32 parity) {
        const u32 thread = thread_here() % 128, first = thread / PIECES, piece = thread % PIECES;
        int rows[COPIES];
        if (step < n_local) {
#pragma unroll
            for (int i = 0; i < COPIES; i++) rows[i] = min(first_local + step * KEYS + (int)first + i * STRIDE, last);
        } else {
            const u32 place = (step - n_local) * KEYS + first;
#pragma unroll
            for (int i = 0; i < COPIES; i++) rows[i] = place + i * STRIDE < n_places ? (list + place)[i * STRIDE] : -1;
        }
        barrier_wait(empty + stage * 8, parity ^ 1);
        const u32 tile = ring + stage * (2 * TILE) + tile_at<KEYS>(first, piece);
        const char *k_piece = (const char*)(k + piece * 8), *v_piece = (const char*)(v + piece * 8);
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const u64 from = (u64)(first_key + (u32)max(rows[i], 0) * G) * (D * 2);
            copy16(tile + i * (STRIDE * 128), k_piece + from);
            copy16(tile + i * (STRIDE * 128) + TILE, v_piece + from);
        }
        if (scores) {
            if (step >= n_local && piece < COPIES) {
                int row = rows[0];
#pragma unroll
                for (int i = 1; i < COPIES; i++) row = piece == i ? rows[i] : row;
                biases[stage * KEYS + first + piece * STRIDE] =
                    row < 0 ? -infinity() : gate_bias(scores[((long)p.b * T + row) * G + p.g], tau[at_block], inverse_temperature);
            }
            barrier_arrive(full + stage * 8);
        }
        barrier_arrive_with_copies(full + stage * 8);
    };

    // Last local key that a row sees, counted from the first; for a row that is padding the last valid one's.
    const auto last_seen = [&](int row) { return p.query(min(row, p.n_rows - 1)) - first_local; };
    const int first_masked = (last_seen(me * 64) + 1) / KEYS, last_key = last_seen(me * 64 + 63), last_local = last_key / KEYS;
    const float scale = LOG2E * rsqrtf((float)D);
    int stage = 0, asked_stage = 0;
    u32 parity = 0, asked_parity = 0;
    for (int careful = 0;; careful = 1) {
        {
            const int thread = threadIdx.x % 128, first = thread / PIECES, piece = thread % PIECES;
#pragma unroll
            for (int i = 0; i < 64; i += STRIDE) {
                copy16(q_tile + tile_at<64>(first, piece) + i * 128, q + (u64)at(min(me * 64 + first + i, p.n_rows - 1)) * D + piece * 8);
            }
            copies_commit();
        }
        float out[D / 8][4] = {}, top0 = -infinity(), top1 = -infinity(), sum0 = 0.0f, sum1 = 0.0f;
        int n_routed = most_routed, turn = 0;
        for (int step = -AHEAD; step < steps; step++) {
            // Before the products, as registers are few while they run.
            if (step + AHEAD < steps) {
                if (turn == me) fetch(step + AHEAD, asked_stage, asked_parity);
                if (++turn == WARPGROUPS) turn = 0;
                if (++asked_stage == STAGES) asked_stage = 0, asked_parity ^= 1;
            }
            if (step < 0) continue;
            if (step == 0) {
                copies_wait<0>();
                warpgroup_sync(me);
            }
            barrier_wait(full + stage * 8, parity);
            // Show the matrix unit what copies of other warpgroups brought.
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            const u32 k_tile = ring + stage * (2 * TILE);
            const bool local = step < n_local;
            if (step == n_local) n_routed = same_in_warp(routed_of_block(list, most_routed));
            const int left = n_routed - 1 - (step - n_local) * KEYS;
            const bool special = careful || step == 0 || (local ? step >= first_masked : scores || left < KEYS - 1);
            if (!local || step <= last_local) {
#pragma unroll
                for (int part = 0; part < KEYS / COLUMNS; part++) {
                    // Behind the last key that a row of the warpgroup sees.
                    if (part > 0 && local && step * KEYS + part * COLUMNS > last_key) break;
                    float s[COLUMNS / 8][4];
                    products_begin();
                    product_of_tiles<D, 64, COLUMNS>(s, q_tile, 0, k_tile + part * (COLUMNS * 128));
                    products_commit();
                    products_wait<0>();
                    if (special) {
                        const u32 thread = thread_here();
                        const int row = thread / 32 * 16 + thread % 32 / 4, column = part * COLUMNS + thread % 4 * 2;
                        if (!local && scores) {
                            const float2* bias = (const float2*)(biases + stage * KEYS + column);
#pragma unroll
                            for (int j = 0; j < COLUMNS / 8; j++) {
                                const float2 beta = bias[j * 4];
                                s[j][0] += beta.x, s[j][1] += beta.y, s[j][2] += beta.x, s[j][3] += beta.y;
                            }
                        }
                        if (local ? step >= first_masked : left < KEYS - 1) {
                            const int seen0 = (local ? last_seen(row) - step * KEYS : left) - column, seen1 = (local ? last_seen(row + 8) - step * KEYS : left) - column;
#pragma unroll
                            for (int j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
                                for (int e = 0; e < 2; e++) {
                                    if (8 * j + e > seen0) s[j][e] = -infinity();
                                    if (8 * j + e > seen1) s[j][2 + e] = -infinity();
                                }
                            }
                        }
                        if ((step == 0 && part == 0) || careful) {
                            // The first keys hold one that the row sees, so the maxima are finite.
                            float new0 = -infinity(), new1 = -infinity();
#pragma unroll
                            for (int j = 0; j < COLUMNS / 8; j++) {
                                new0 = fmaxf(new0, fmaxf(s[j][0], s[j][1]));
                                new1 = fmaxf(new1, fmaxf(s[j][2], s[j][3]));
                            }
                            new0 = fmaxf(top0, quad_max(new0) * scale), new1 = fmaxf(top1, quad_max(new1) * scale);
                            if (careful) {
                                const float shrink0 = exp2_fast(top0 - new0), shrink1 = exp2_fast(top1 - new1);
                                sum0 *= shrink0, sum1 *= shrink1;
#pragma unroll
                                for (int j = 0; j < D / 8; j++) {
                                    out[j][0] *= shrink0, out[j][1] *= shrink0;
                                    out[j][2] *= shrink1, out[j][3] *= shrink1;
                                }
                            }
                            top0 = new0, top1 = new1;
                        }
                    }
                    u32 weights[COLUMNS / 16][4];
                    exponentials(s, scale, top0, top1, sum0, sum1);
                    to_fragments<COLUMNS>(weights, s);
                    products_begin();
                    product_with_tile<COLUMNS, D>(out, weights, k_tile + TILE + part * (COLUMNS * 128));
                    products_commit();
                    products_wait<0>();
                }
            }
            if (thread_here() % 32 == 0) barrier_arrive(empty + stage * 8);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        sum0 = quad_sum(sum0), sum1 = quad_sum(sum1);
        const u32 thread = thread_here(), lane = thread % 32;
        const int row = thread / 32 * 16 + lane / 4;
        // By way of the queries' tile, which nobody reads any more; a warp stores its own rows.
        unsigned char* tile = shared + Shared::q + me * TILE;
        warpgroup_sync(me);
        accumulators_to_tile<64, D>(tile, thread / 32 % 4 * 16, out, inverse(sum0), inverse(sum1));
        if (lane % 4 == 0) {
            if (row < p.n_rows) lse[at(row)] = (top0 + log2_fast(sum0)) * 0.693147181f;
            if (row + 8 < p.n_rows) lse[at(row + 8)] = (top1 + log2_fast(sum1)) * 0.693147181f;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; i += 32 / PIECES) {
            const int here = thread / 32 % 4 * 16 + i + lane / PIECES;
            if (me * 64 + here < p.n_rows) *(uint4*)(o + (u64)at(me * 64 + here) * D + lane % PIECES * 8) = *(const uint4*)(tile + tile_at<64>(here, lane % PIECES));
        }
        const bool too_large = (row < p.n_rows && !(sum0 <= LARGEST_SUM)) || (row + 8 < p.n_rows && !(sum1 <= LARGEST_SUM));
        if (!same_in_warp(__syncthreads_or(too_large)) || careful) break;
    }
    if (p.n_rows < p.n_padded) clear_padding();
}

}  // namespace forward

#endif
