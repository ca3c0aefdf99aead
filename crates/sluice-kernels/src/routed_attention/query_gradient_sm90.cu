// Routed attention by blocks of queries: the gradient of the queries on Hopper for heads of 128.
// Follows query_gradient.cu, which computes the same everywhere.
//
// Threads stay for many tiles. Two warps copy the rows of the next tile while this one is computed and find out what must
// be known of them, two others copy keys and values a few steps ahead. The other warpgroups have 64 rows each and compute;
// they wait for nothing but what they read, so that one computes weights while another uses the matrix unit. Parts of
// shared memory change hands through barriers that count phases: `full` when copies have arrived, `empty` when all who
// read them have.

#if WGMMA && HEAD_DIM == 128

constexpr int STAGES = 3;   // Tiles of keys and of values.

// What follows two tiles of q, two of dout and STAGES of keys and of values in shared memory; cuda.rs knows its size.
struct Shared {
    u64 rows_full[2], rows_empty[2], keys_full[STAGES], keys_empty[STAGES];     // Barriers.
    int n_routed[2];
    float top[2][ROWS], delta[2][ROWS];     // Log sum in units of log2, infinite for padding; sum of dout * o.
    float bias[STAGES][KEYS];
};
static_assert(sizeof(Shared) == 2904, "cuda.rs counts on this");

// A barrier of N threads, by number; with a count of those who say yes.
template <int N>
__device__ __forceinline__ void barrier_of(int number) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(number), "n"(N) : "memory");
}

template <int N>
__device__ __forceinline__ int barrier_count(int number, bool yes) {
    int n;
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\nbarrier.cta.red.popc.u32 %0, %1, %2, p;\n}" : "=r"(n) : "r"(number), "n"(N), "r"((int)yes) : "memory");
    return n;
}

// `copy_rows` of two matrices by 64 threads, `thread` of them this one: a source is asked for by its row and by its number among
// those of the thread.
template <int ROWS, class Source>
__device__ __forceinline__ void copy_rows_64(u32 x_tile, const bf16* x, u32 y_tile, const bf16* y, int thread, Source source) {
    constexpr int STRIDE = 64 / (D / 8), PERIOD = STRIDE < 8 ? 8 : STRIDE;
    const int first = thread / (D / 8), piece = thread % (D / 8);
    const char *x_piece = (const char*)(x + piece * 8), *y_piece = (const char*)(y + piece * 8);
#pragma unroll
    for (int e = 0; e < PERIOD; e += STRIDE) {
        const u32 at = tile_at<ROWS>(first + e, piece);
#pragma unroll 8
        for (int i = 0; i < ROWS; i += PERIOD) {
            const u64 from = (u64)(u32)source(first + e + i, (e + i) / STRIDE) * (D * 2);
            copy16(x_tile + at + i * 128, x_piece + from);
            copy16(y_tile + at + i * 128, y_piece + from);
        }
    }
}

// A place in a ring of N parts, and the parity of the phase that fills it.
template <int N>
struct Turn {
    int at = 0, parity = 0;

    __device__ __forceinline__ void next() {
        if (++at == N) at = 0, parity ^= 1;
    }
};

// As `place` and `list_keys`, of any tile.
__device__ __forceinline__ Place place_of(const int* lens, int tile, int T, int G, int n_blocks, int every, Group group) {
    Place p;
    const int tiles = (every * group.n + ROWS - 1) / ROWS, block = tile / tiles, pair = block / n_blocks, first = tile % tiles * ROWS;
    p.group = group;
    p.block = block % n_blocks, p.g = pair % G, p.b = pair / G;
    p.begin = p.block * every;
    p.first_row = p.begin * group.n + first;
    p.n_padded = min(ROWS, min(every, T - p.begin) * group.n - first);
    p.n_rows = min(ROWS, min(every, lens[p.b] - p.begin) * group.n - first);
    return p;
}

__device__ __forceinline__ Keys keys_of(const Place& p, int n_routed, int window) {
    Keys keys;
    keys.rows = nullptr;
    keys.n_routed = n_routed;
    keys.first_local = max(0, p.begin - window + 1);
    keys.n = n_routed + p.query(p.n_rows - 1) - keys.first_local + 1;
    return keys;
}

// dq [B, T, H, D] and delta [B, T, H] = sum of dout * o. Grid: one block of threads on every multiprocessor; `n_tiles` tiles,
// those of a block of queries, of a KV head, of a sequence next to each other. 384 threads.
extern "C" __global__ __launch_bounds__(128 + THREADS, 1) void routed_attention_dq_sm90(
    const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const bf16* o, const float* lse, const float* scores, const int* indices, const float* tau,
    const int* lens, bf16* dq, float* delta, int T, int G, int n_blocks, int n_places, int window, int every, float inverse_temperature, int group, u32 reciprocal,
    int n_tiles) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 q_tiles = shared_address(shared), dout_tiles = q_tiles + 2 * Layout::row_tile, k_tiles = dout_tiles + 2 * Layout::row_tile;
    const u32 v_tiles = k_tiles + STAGES * Layout::key_tile;
    Shared& state = *(Shared*)(shared + 4 * Layout::row_tile + 2 * STAGES * Layout::key_tile);
    const u32 rows_full = shared_address(state.rows_full), rows_empty = shared_address(state.rows_empty), keys_full = shared_address(state.keys_full);
    const u32 keys_empty = shared_address(state.keys_empty);
    if (threadIdx.x == 0) {
        // Every thread arrives for itself, and those who copy keys once more with their copies.
        for (int i = 0; i < 2; i++) barrier_init(rows_full + 8 * i, 64), barrier_init(rows_empty + 8 * i, THREADS);
        for (int i = 0; i < STAGES; i++) barrier_init(keys_full + 8 * i, 2 * 64), barrier_init(keys_empty + 8 * i, THREADS);
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
    Turn<STAGES> turn;
    Turn<2> row_turn;

    if (warpgroup() == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(88));
        if (threadIdx.x < 64) {
            for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
                const Place p = place_of(lens, tile, T, G, n_blocks, every, {group, reciprocal});
                if (p.n_rows <= 0) {
                    for (int i = threadIdx.x; i < p.n_padded; i += 64) delta[p.at(i, T, G)] = 0.0f;
                    continue;
                }
                barrier_wait(rows_empty + 8 * row_turn.at, row_turn.parity ^ 1);
                copy_rows_64<ROWS>(q_tiles + row_turn.at * Layout::row_tile, q, dout_tiles + row_turn.at * Layout::row_tile, dout, threadIdx.x,
                                      [&](int i, int) { return p.at(min(i, p.n_rows - 1), T, G); });
                copies_commit();
                const int* list = indices + (((long)p.b * n_blocks + p.block) * G + p.g) * n_places;
                int n_routed = 0;
                for (int i = threadIdx.x; i < (n_places + 63) / 64 * 64; i += 64) n_routed += barrier_count<64>(1, i < n_places && list[i] >= 0);
                if (threadIdx.x == 0) state.n_routed[row_turn.at] = n_routed;
                constexpr int AT_ONCE = 2;
#pragma unroll 1
                for (int first = 0; first < ROWS; first += AT_ONCE * 16) {
                    uint4 xs[AT_ONCE][D / 32];
                    float log_sums[AT_ONCE];
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++) {
                        const u32 at = p.at(min(first + i * 16 + (int)threadIdx.x / 4, p.n_rows - 1), T, G);
                        log_sums[i] = lse[at];
#pragma unroll
                        for (int e = 0; e < D / 32; e++) xs[i][e] = *(const uint4*)(o + (u64)at * D + (e * 4 + lane % 4) * 8);
                    }
                    if (first == 0) {
                        // Shows what was copied to the matrix unit and to the other warp.
                        copies_wait<0>();
                        barrier_of<64>(1);
                    }
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++) {
                        const int row = first + i * 16 + threadIdx.x / 4;
                        float sum = 0.0f;
#pragma unroll
                        for (int e = 0; e < D / 32; e++) {
                            const uint4 x = xs[i][e], y = *(const uint4*)(shared + (2 + row_turn.at) * Layout::row_tile + tile_at<ROWS>(row, e * 4 + lane % 4));
                            const u32 x4[4] = {x.x, x.y, x.z, x.w}, y4[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
                            for (int f = 0; f < 4; f++) sum += low_float(x4[f]) * low_float(y4[f]) + high_float(x4[f]) * high_float(y4[f]);
                        }
                        sum = quad_sum(sum);
                        if (lane % 4 == 0) {
                            state.delta[row_turn.at][row] = sum;
                            state.top[row_turn.at][row] = row < p.n_rows ? log_sums[i] * LOG2E : infinity();
                            if (row < p.n_padded) delta[p.at(row, T, G)] = row < p.n_rows ? sum : 0.0f;
                        }
                    }
                }
                barrier_arrive(rows_full + 8 * row_turn.at);
                row_turn.next();
            }
        } else {
            // Of the keys of a step a warp copies 32, and a lane knows where one of them is. Routed ones are asked for a step ahead.
            constexpr int LANES = D / 8, AT_ONCE = 32 / LANES;
            const int place = (threadIdx.x / 32 - 2) * AT_ONCE + lane % AT_ONCE + lane / AT_ONCE * (2 * AT_ONCE);
            for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
                const Place p = place_of(lens, tile, T, G, n_blocks, every, {group, reciprocal});
                if (p.n_rows <= 0) continue;
                const long at = ((long)p.b * n_blocks + p.block) * G + p.g;
                const int* list = indices + at * n_places;
                const float tau_b = scores ? tau[at] : 0.0f;
                int routed = place < n_places ? list[place] : -1;
                barrier_wait(rows_full + 8 * row_turn.at, row_turn.parity);
                const Keys keys = keys_of(p, state.n_routed[row_turn.at], window);
                row_turn.next();
                for (int step = 0; step * KEYS < keys.n; step++) {
                    const int slot = min(step * KEYS + place, keys.n - 1);
                    const u32 mine = ((u32)p.b * T + (slot < keys.n_routed ? routed : slot - keys.n_routed + keys.first_local)) * G + p.g;
                    const bool is_routed = slot < keys.n_routed;
                    routed = slot + KEYS < keys.n_routed ? list[slot + KEYS] : 0;
                    barrier_wait(keys_empty + 8 * turn.at, turn.parity ^ 1);
                    copy_rows_64<KEYS>(k_tiles + turn.at * Layout::key_tile, k, v_tiles + turn.at * Layout::key_tile, v, threadIdx.x - 64,
                                       [&](int, int i) { return __shfl_sync(0xffffffffu, mine, i * AT_ONCE + lane / LANES); });
                    barrier_arrive_with_copies(keys_full + 8 * turn.at);
                    if (scores && is_routed) {
                        const float s = scores[mine];
                        const float x = (s - tau_b) * inverse_temperature;
                        // As in `list_keys`.
                        const float beta = fminf(x, 0.0f) - log1pf(expf(-fabsf(x)));
                        state.bias[turn.at][place] = s == infinity() || tau_b == -infinity() ? 0.0f : beta * sqrtf((float)D);
                    }
                    barrier_arrive(keys_full + 8 * turn.at);
                    turn.next();
                }
            }
            asm volatile("cp.async.wait_all;" ::: "memory");
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(208));
        const int mine = warpgroup() - 1, thread = threadIdx.x - 128, row = thread / 32 * 16 + lane / 4;
        const float scale = LOG2E * rsqrtf((float)D);
        for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
            const Place p = place_of(lens, tile, T, G, n_blocks, every, {group, reciprocal});
            if (p.n_rows <= 0) {
                for (int i = thread; i < p.n_padded * (D / 8); i += WARPGROUPS * 128) *(uint4*)(dq + (u64)p.at(i / (D / 8), T, G) * D + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
                continue;
            }
            barrier_wait(rows_full + 8 * row_turn.at, row_turn.parity);
            const Keys keys = keys_of(p, state.n_routed[row_turn.at], window);
            const int steps = (keys.n + KEYS - 1) / KEYS;
            const u32 q_tile = q_tiles + row_turn.at * Layout::row_tile, dout_tile = dout_tiles + row_turn.at * Layout::row_tile;
            const float top0 = state.top[row_turn.at][row], top1 = state.top[row_turn.at][row + 8];
            const float delta0 = state.delta[row_turn.at][row], delta1 = state.delta[row_turn.at][row + 8];
            const int limit0 = last_slot(p, keys, row), limit1 = last_slot(p, keys, row + 8);
            const int first_masked = (last_slot(p, keys, mine * 64) + 1) / KEYS;
            float out[D / 8][4] = {};
            Logits s, ds;
            u32 factors[KEYS / 16][4];
            // The fence shows to the matrix unit what others have copied.
            const auto keys_wait = [&]() {
                barrier_wait(keys_full + 8 * turn.at, turn.parity);
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            };
            const auto start = [&]() {
                products_begin();
                product_of_tiles<D, ROWS, KEYS>(s, q_tile, mine * 64, k_tiles + turn.at * Layout::key_tile);
                product_of_tiles<D, ROWS, KEYS>(ds, dout_tile, mine * 64, v_tiles + turn.at * Layout::key_tile);
                products_commit();
            };
            const auto logit_gradients = [&](int step) {
                bias_and_mask(s, keys, scores ? state.bias[turn.at] - step * KEYS : nullptr, step, first_masked, limit0, limit1);
                logits_to_gradients(s, ds, scale, top0, top1, delta0, delta1);
            };
            keys_wait();
            start();
            products_wait<0>();
            logit_gradients(0);
            int before = turn.at;
            turn.next();
            for (int step = 1; step < steps; step++) {
                products_wait<0>();
                if (step > 1) barrier_arrive(keys_empty + 8 * (before == 0 ? STAGES - 1 : before - 1));
                keys_wait();
                to_fragments<KEYS>(factors, s);
                start();
                product_with_tile<KEYS, D>(out, factors, k_tiles + before * Layout::key_tile);
                products_commit();
                products_wait<1>();
                logit_gradients(step);
                before = turn.at;
                turn.next();
            }
            products_wait<0>();
            if (steps > 1) barrier_arrive(keys_empty + 8 * (before == 0 ? STAGES - 1 : before - 1));
            to_fragments<KEYS>(factors, s);
            products_begin();
            product_with_tile<KEYS, D>(out, factors, k_tiles + before * Layout::key_tile);
            products_commit();
            products_wait<0>();
            barrier_arrive(keys_empty + 8 * before);
            // The rows of q that this warpgroup has read become its rows of dq.
            unsigned char* result = shared + row_turn.at * Layout::row_tile;
            barrier_of<128>(mine + 2);
            accumulators_to_tile<ROWS, D>(result, thread / 32 * 16, out, rsqrtf((float)D), rsqrtf((float)D));
            barrier_of<128>(mine + 2);
#pragma unroll
            for (int i = 0; i < 64; i += 128 / (D / 8)) {
                const int to = mine * 64 + i + thread % 128 / (D / 8), piece = thread % (D / 8);
                uint4 x = *(const uint4*)(result + tile_at<ROWS>(to, piece));
                if (to >= p.n_rows) x = make_uint4(0, 0, 0, 0);
                if (to < p.n_padded) *(uint4*)(dq + (u64)p.at(to, T, G) * D + piece * 8) = x;
            }
            barrier_arrive(rows_empty + 8 * row_turn.at);
            row_turn.next();
        }
    }
}

#endif
