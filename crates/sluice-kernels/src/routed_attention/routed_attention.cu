// Routed attention by blocks of queries: what both passes over a block's keys share, and the forward pass.
// Follows attention_tile/tile.cuh; query_gradient.cu follows.
//
// A row is one query of one head. The `route_every * group` rows of a block of queries and a KV head see one list
// of keys: the routed ones, gathered, then the local strip, contiguous. Only the strip's end is masked. So a tile of
// rows walks over the list in steps of KEYS keys, and every gathered key serves all its rows. Copies run a step
// ahead; asking for them takes as long as a product, so a warp does it while the step's first product runs.
// Positions start at 0 and key rows are positions.
//
// Grid: x = n_blocks * ceil(route_every * group / ROWS), y = KV heads, z = batch; THREADS threads; dynamic shared memory:
// one tile of ROWS and four of KEYS forward, two and five for dq, and 8 bytes a place for routed keys.

// Warpgroups of a tile, and blocks of threads that must fit a multiprocessor: the fastest of those tried on an H100.
constexpr int WARPGROUPS = D == 64 ? 1 : 2, FWD_CTAS = D == 64 ? 5 : 2, DQ_CTAS = D == 64 ? 3 : 1;
constexpr int ROWS = WARPGROUPS * 64, THREADS = WARPGROUPS * 128, KEYS = 64;

// Offsets in shared memory, in bytes. The list of routed keys and their biases follow, 4 bytes each.
struct Layout {
    static constexpr int row_tile = ROWS * D * 2, key_tile = KEYS * D * 2;
};

using Logits = float[KEYS / 8][4];

struct Keys {
    const int* rows;    // Routed rows, in shared memory.
    int n_routed;       // Those that are there.
    int first_local;    // Position of the strip's first key.
    int n;              // Routed and local ones that some row of the tile sees.
};

// What is the same for all threads of a tile.
struct Place {
    Group group;
    int b, g, block;
    int begin;          // First query of the block.
    int first_row;      // First of the tile's rows, counted from the sequence's first.
    int n_padded;       // Rows of the tile that exist in memory.
    int n_rows;         // Rows of the tile that are valid.

    __device__ int query(int row) const { return group.quotient(first_row + row); }
    __device__ u32 at(int row, int T, int G) const { return group.at(b, T, G, g, first_row + row); }
};

__device__ __forceinline__ Place place(const int* lens, int T, int n_blocks, int every, Group group) {
    Place p;
    const int tiles = (every * group.n + ROWS - 1) / ROWS, tile = blockIdx.x % tiles * ROWS;
    p.group = group;
    p.block = blockIdx.x / tiles, p.g = blockIdx.y, p.b = blockIdx.z;
    p.begin = p.block * every;
    p.first_row = p.begin * group.n + tile;
    p.n_padded = min(ROWS, min(every, T - p.begin) * group.n - tile);
    p.n_rows = min(ROWS, min(every, lens[p.b] - p.begin) * group.n - tile);
    return p;
}

// The first places of a block's list, asked for before what `list_keys` must wait for.
struct Early {
    static constexpr int N = 256 / THREADS;
    int rows[N];

    __device__ __forceinline__ void load(const Place& p, const int* indices, int G, int n_blocks, int n_places) {
        const int* list = indices + (((long)p.b * n_blocks + p.block) * G + p.g) * n_places;
#pragma unroll
        for (int e = 0; e < N; e++) {
            const int i = e * THREADS + threadIdx.x;
            rows[e] = i < n_places ? list[i] : -1;
        }
    }
};

// The list of keys of a tile; routed rows and (in units of the raw logit) biases go to shared memory.
__device__ __forceinline__ Keys list_keys(const Place& p, const Early& early, int* rows, float* bias, const int* indices, const float* tau, const float* scores, int T,
                                          int G, int n_blocks, int n_places, int window, float inverse_temperature) {
    const long at = ((long)p.b * n_blocks + p.block) * G + p.g;
    const float tau_b = scores ? tau[at] : 0.0f;
    int n = 0;
    const auto take = [&](int i, int row) {
        if (row >= 0) {
            rows[i] = row;
            if (scores) {
                const float s = scores[((long)p.b * T + row) * G + p.g];
                const float x = (s - tau_b) * inverse_temperature;
                // log sigmoid without overflow on either side; a sink and a budget that is not full have no bias.
                const float beta = fminf(x, 0.0f) - log1pf(expf(-fabsf(x)));
                bias[i] = s == infinity() || tau_b == -infinity() ? 0.0f : beta * sqrtf((float)D);
            }
        }
        n += __syncthreads_count(row >= 0);
    };
#pragma unroll
    for (int e = 0; e < Early::N; e++) take(e * THREADS + threadIdx.x, early.rows[e]);
    for (int i = 256 + threadIdx.x; i < (n_places + THREADS - 1) / THREADS * THREADS; i += THREADS) take(i, i < n_places ? indices[at * n_places + i] : -1);
    Keys keys;
    keys.rows = rows;
    keys.n_routed = n;
    keys.first_local = max(0, p.begin - window + 1);
    keys.n = n + p.query(p.n_rows - 1) - keys.first_local + 1;
    return keys;
}

// The row of key `i` of the list, counted over all sequences and KV heads; behind the list's end, the last one again.
__device__ __forceinline__ u32 key_row(const Keys& keys, const Place& p, int i, int T, int G) {
    const int slot = min(i, keys.n - 1);
    const int row = slot < keys.n_routed ? keys.rows[slot] : slot - keys.n_routed + keys.first_local;
    return ((u32)p.b * T + row) * G + p.g;
}

// Add the biases of a step's routed keys to raw logits, and hide the keys that a row does not see.
__device__ __forceinline__ void bias_and_mask(float (&s)[KEYS / 8][4], const Keys& keys, const float* bias, int step, int first_masked, int limit0, int limit1) {
    const int column = step * KEYS + threadIdx.x % 4 * 2;
    if (bias && step * KEYS < keys.n_routed) {
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int slot = column + 8 * j + e;
                const float beta = slot < keys.n_routed ? bias[slot] : 0.0f;
                s[j][e] += beta;
                s[j][2 + e] += beta;
            }
        }
    }
    if (step >= first_masked) {
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int slot = column + 8 * j + e;
                if (slot > limit0) s[j][e] = -infinity();
                if (slot > limit1) s[j][2 + e] = -infinity();
            }
        }
    }
}

// Last slot of the list that a row sees; all of them for a row that is padding.
__device__ __forceinline__ int last_slot(const Place& p, const Keys& keys, int row) {
    return row < p.n_rows ? keys.n_routed + p.query(row) - keys.first_local : keys.n - 1;
}

// o [B, T, H, D] and lse [B, T, H] (natural logarithm). `scores` [B, T, G] is null without a gate bias.
extern "C" __global__ __launch_bounds__(THREADS, FWD_CTAS) void routed_attention_fwd(
    const bf16* q, const bf16* k, const bf16* v, const float* scores, const int* indices, const float* tau, const int* lens, bf16* o, float* lse, int T, int G,
    int n_blocks, int n_places, int window, int every, float inverse_temperature, int group, u32 reciprocal) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const Place p = place(lens, T, n_blocks, every, {group, reciprocal});
    if (p.n_padded <= 0) return;
    if (p.n_rows <= 0) {
        for (int i = threadIdx.x; i < p.n_padded * (D / 8); i += THREADS) *(uint4*)(o + (u64)p.at(i / (D / 8), T, G) * D + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
        for (int i = threadIdx.x; i < p.n_padded; i += THREADS) lse[p.at(i, T, G)] = -infinity();
        return;
    }
    const u32 q_tile = shared_address(shared), kv = q_tile + Layout::row_tile;
    int* rows = (int*)(shared + Layout::row_tile + 4 * Layout::key_tile);
    float* bias = scores ? (float*)(rows + n_places) : nullptr;

    Early early;
    early.load(p, indices, G, n_blocks, n_places);
    copy_rows<ROWS, D, THREADS>(q_tile, q, [&](int i) { return p.at(min(i, p.n_rows - 1), T, G); });
    const Keys keys = list_keys(p, early, rows, bias, indices, tau, scores, T, G, n_blocks, n_places, window, inverse_temperature);
    const int steps = (keys.n + KEYS - 1) / KEYS, warpgroup_row = warpgroup() * 64;
    const auto k_tile = [&](int step) { return kv + step % 2 * (2 * Layout::key_tile); };
    const auto v_tile = [&](int step) { return k_tile(step) + Layout::key_tile; };
    const auto fetch = [&](int step) {
        copy_rows<KEYS, D, THREADS>(k_tile(step), k, v_tile(step), v, [&](int i) { return key_row(keys, p, step * KEYS + i, T, G); });
        copies_commit();
    };
    fetch(0);

    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    const int limit0 = last_slot(p, keys, row), limit1 = last_slot(p, keys, row + 8);
    const int first_masked = (last_slot(p, keys, 0) + 1) / KEYS;
    const float scale = LOG2E * rsqrtf((float)D);
    float out[D / 8][4] = {};
    OnlineSoftmax softmax;
    Logits s;
    for (int step = 0; step < steps; step++) {
        copies_wait<0>();
        __syncthreads();
        products_begin();
        product_of_tiles<D, ROWS, KEYS>(s, q_tile, warpgroup_row, k_tile(step));
        products_commit();
        fetch(step + 1);
        products_wait<0>();
        bias_and_mask(s, keys, bias, step, first_masked, limit0, limit1);
        softmax.weigh(s, scale);
        u32 weights[KEYS / 16][4];
        to_fragments<KEYS>(weights, s);
        softmax.shrink(out);
        products_begin();
        product_with_tile<KEYS, D>(out, weights, v_tile(step));
        products_commit();
        products_wait<0>();
    }
    const float sum0 = quad_sum(softmax.sum0), sum1 = quad_sum(softmax.sum1);
    __syncthreads();
    accumulators_to_tile<ROWS, D>(shared, threadIdx.x / 32 * 16, out, 1.0f / sum0, 1.0f / sum1);
    if (lane % 4 == 0) {
        if (row < p.n_rows) lse[p.at(row, T, G)] = (softmax.max0 * scale + log2f(sum0)) / LOG2E;
        if (row + 8 < p.n_rows) lse[p.at(row + 8, T, G)] = (softmax.max1 * scale + log2f(sum1)) / LOG2E;
    }
    __syncthreads();
    store_rows<ROWS, D, THREADS>(shared, o, p.n_rows, [&](int i) { return p.at(i, T, G); });
    for (int i = p.n_rows * (D / 8) + threadIdx.x; i < p.n_padded * (D / 8); i += THREADS) {
        *(uint4*)(o + (u64)p.at(i / (D / 8), T, G) * D + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
    }
    for (int i = p.n_rows + threadIdx.x; i < p.n_padded; i += THREADS) lse[p.at(i, T, G)] = -infinity();
}
