// Dense attention on tensor cores: factors bf16, sums and softmax f32. Follows attention_tile/walk.cuh.
//
// A row is one query of one head; rows of a KV head are ordered by query, then head, so that a tile of rows meets every key
// once for all heads that share it, and only its last steps are masked. Gradients of keys keep 64 keys a warpgroup in place and
// visit the queries that see them, head after head. No atomics: every sum has one order.
//
// Query `i` stands at position `start + i`; keys are numbered by position. With `start` = WHOLE (an encoder, forward only) every query sees
// every valid key. Grid: x = sequences times KV heads, y = tiles, the
// longest first. Tiles of no valid query write zeros.

// Warpgroups of a block, and blocks that must fit a multiprocessor: the fastest of those tried on an H100.
constexpr int FWD_WARPGROUPS = D == 64 ? 2 : 3, FWD_CTAS = D == 64 ? 2 : 1;
constexpr int DQ_WARPGROUPS = 1, DQ_CTAS = D == 64 ? 3 : 2;
constexpr int DKV_WARPGROUPS = 1, DKV_CTAS = D == 64 ? 3 : 2;

// As `start`: larger than any position.
constexpr int WHOLE = 1 << 30;

struct Sizes {
    int T, S, G, start;
    Group group;
    int read_g;     // KV heads from a token to the next in what is read: G, or more where queries, keys and values share rows.
};

// Rows of a KV head that a block of threads has.
template <int ROWS>
struct Place {
    Sizes size;
    int b, g;
    int first;      // First row, counted from the sequence's first.
    int n_padded;   // Rows that exist in memory.
    int n_rows;     // Rows that are valid.
    int n_keys;     // Keys that some row sees.

    __device__ __forceinline__ Place(const Sizes& sizes, const int* lens) : size(sizes) {
        b = blockIdx.x / size.G, g = blockIdx.x % size.G;
        first = (gridDim.y - 1 - blockIdx.y) * ROWS;
        n_padded = min(ROWS, size.T * size.group.n - first);
        n_rows = min(ROWS, lens[b] * size.group.n - first);
        n_keys = min(position(n_rows - 1) + 1, size.start == WHOLE ? lens[b] : WHOLE);
    }
    __device__ __forceinline__ int position(int row) const { return size.start + size.group.quotient(first + row); }
    // Last key that a row sees; all of them for a row that is padding.
    __device__ __forceinline__ int last_key(int row) const { return row < n_rows ? min(position(row), n_keys - 1) : n_keys - 1; }
    // Steps before this one are not masked.
    __device__ __forceinline__ int first_masked() const { return min(position(0) + 1, n_keys) / KEYS; }
    __device__ __forceinline__ u32 at(int row) const { return size.group.at(b, size.T, size.G, g, first + row); }
    __device__ __forceinline__ u32 row_to_load(int row) const { return size.group.at(b, size.T, size.read_g, g, first + min(row, n_rows - 1)); }
    // A step's key; behind the last one that is seen that one again.
    __device__ __forceinline__ u32 key(int step, int i) const { return ((u32)b * size.S + min(step * KEYS + i, n_keys - 1)) * size.read_g + g; }
};

// Hide the keys of a step that a thread's two rows do not see.
__device__ __forceinline__ void mask(Logits& s, int step, int last0, int last1) {
    const int column = step * KEYS + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (column + 8 * j + e > last0) s[j][e] = -infinity();
            if (column + 8 * j + e > last1) s[j][2 + e] = -infinity();
        }
    }
}

// o [B, T, H, D] and lse [B, T, H] (natural logarithm). `rows` is 3 where q, k and v are rows of one matrix [B, T, 3, H, D], otherwise 1.
extern "C" __global__ __launch_bounds__(FWD_WARPGROUPS * 128, FWD_CTAS) void dense_bf16_fwd(const bf16* q, const bf16* k, const bf16* v, const int* lens, bf16* o, float* lse,
                                                                                 int rows, int T, int S, int G, int start, int group, u32 reciprocal) {
    constexpr int ROWS = FWD_WARPGROUPS * 64, THREADS = FWD_WARPGROUPS * 128;
    extern __shared__ __align__(1024) unsigned char shared[];
    const Place<ROWS> p({T, S, G, start, {group, reciprocal}, rows * G}, lens);
    write_padding<THREADS>(o, lse, -infinity(), p.n_rows, p.n_padded, [&](int i) { return p.at(i); });
    if (p.n_rows <= 0) return;
    const int row = row_of_thread(), first_masked = p.first_masked(), last0 = p.last_key(row), last1 = p.last_key(row + 8);
    walk_over_keys<FWD_WARPGROUPS>(
        shared, q, k, v, o, lse, (p.n_keys + KEYS - 1) / KEYS, p.n_rows, [&](int i) { return p.row_to_load(i); },
        [&](int step, int i) { return p.key(step, i); },
        [&](Logits& s, int step) {
            if (step >= first_masked) mask(s, step, last0, last1);
        },
        [&](int i) { return p.at(i); });
}

// dq [B, T, H, D], and delta [B, T, H] = sum of dout * o, which the gradients of keys and values need too.
extern "C" __global__ __launch_bounds__(DQ_WARPGROUPS * 128, DQ_CTAS) void dense_bf16_dq(const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const bf16* o, const float* lse,
                                                                              const int* lens, bf16* dq, float* delta, int T, int S, int G, int start, int group, u32 reciprocal) {
    constexpr int ROWS = DQ_WARPGROUPS * 64, THREADS = DQ_WARPGROUPS * 128;
    extern __shared__ __align__(1024) unsigned char shared[];
    const Place<ROWS> p({T, S, G, start, {group, reciprocal}, G}, lens);
    write_padding<THREADS>(dq, delta, 0.0f, p.n_rows, p.n_padded, [&](int i) { return p.at(i); });
    if (p.n_rows <= 0) return;
    const u32 q_tile = shared_address(shared), dout_tile = q_tile + ROWS * D * 2, kv = dout_tile + ROWS * D * 2;
    float* deltas = (float*)(shared + 2 * ROWS * D * 2 + 5 * KEY_TILE);
    const auto k_tile = [&](int step) { return kv + step % 3 * KEY_TILE; };
    const auto v_tile = [&](int step) { return kv + (3 + step % 2) * KEY_TILE; };
    const int steps = (p.n_keys + KEYS - 1) / KEYS;
    const auto fetch = [&](int step) {
        if (step < steps) copy_rows<KEYS, D, THREADS>(k_tile(step), k, v_tile(step), v, [&](int i) { return p.key(step, i); });
        copies_commit();
    };
    copy_rows<ROWS, D, THREADS>(q_tile, q, dout_tile, dout, [&](int i) { return p.row_to_load(i); });
    fetch(0);
    fetch(1);
    const int row = row_of_thread();
    // Rows that are padding have no weights.
    const float top0 = row < p.n_rows ? lse[p.at(row)] * LOG2E : infinity(), top1 = row + 8 < p.n_rows ? lse[p.at(row + 8)] * LOG2E : infinity();
    copies_wait<1>();
    __syncthreads();
    for_pieces<ROWS, D, THREADS>([&](int i, u32 at) {
        const uint4 x = *(const uint4*)(o + (u64)p.row_to_load(i) * D + threadIdx.x % (D / 8) * 8), y = *(const uint4*)(shared + ROWS * D * 2 + at);
        const u32 xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
        float sum = 0.0f;
#pragma unroll
        for (int e = 0; e < 4; e++) sum += low_float(xs[e]) * low_float(ys[e]) + high_float(xs[e]) * high_float(ys[e]);
#pragma unroll
        for (int other = 1; other < D / 8; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
        if (threadIdx.x % (D / 8) == 0) {
            deltas[i] = sum;
            if (i < p.n_rows) delta[p.at(i)] = sum;
        }
    });
    __syncthreads();

    const int last0 = p.last_key(row), last1 = p.last_key(row + 8), first_masked = p.first_masked(), warpgroup_row = warpgroup() * 64;
    const float scale = LOG2E * rsqrtf((float)D), delta0 = deltas[row], delta1 = deltas[row + 8];
    float out[D / 8][4] = {}, s[KEYS / 8][4], ds[KEYS / 8][4];
    u32 factors[KEYS / 16][4];
    const auto begin = [&](int step) {
        products_begin();
        product_of_tiles<D, ROWS, KEYS>(s, q_tile, warpgroup_row, k_tile(step));
        product_of_tiles<D, ROWS, KEYS>(ds, dout_tile, warpgroup_row, v_tile(step));
        products_commit();
    };
    const auto logit_gradients = [&](int step) {
        if (step >= first_masked) mask(s, step, last0, last1);
        logits_to_gradients(s, ds, scale, top0, top1, delta0, delta1);
    };
    begin(0);
    products_wait<0>();
    logit_gradients(0);
    for (int step = 1; step < steps; step++) {
        products_wait<0>();
        copies_wait<0>();
        __syncthreads();
        to_fragments<KEYS>(factors, s);
        fetch(step + 1);
        begin(step);
        product_with_tile<KEYS, D>(out, factors, k_tile(step - 1));
        products_commit();
        products_wait<1>();
        logit_gradients(step);
    }
    products_wait<0>();
    to_fragments<KEYS>(factors, s);
    products_begin();
    product_with_tile<KEYS, D>(out, factors, k_tile(steps - 1));
    products_commit();
    products_wait<0>();
    copies_wait<0>();
    __syncthreads();
    accumulators_to_tile<ROWS, D>(shared, threadIdx.x / 32 * 16, out, rsqrtf((float)D), rsqrtf((float)D));
    __syncthreads();
    store_rows<ROWS, D, THREADS>(shared, dq, p.n_rows, [&](int i) { return p.at(i); });
}

// dk, dv [B, S, G, D].
extern "C" __global__ __launch_bounds__(DKV_WARPGROUPS * 128, DKV_CTAS) void dense_bf16_dkv(const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                                                                 const float* delta, const int* lens, bf16* dk, bf16* dv, int T, int S, int G, int start, int group,
                                                                                 u32) {
    constexpr int HERE = DKV_WARPGROUPS * 64, THREADS = DKV_WARPGROUPS * 128, QUERIES = 64, TILE = HERE * D * 2, ROW_TILE = QUERIES * D * 2;
    extern __shared__ __align__(1024) unsigned char shared[];
    const int b = blockIdx.x / G, g = blockIdx.x % G, first = blockIdx.y * HERE, len = lens[b], H = G * group;
    const int first_query = max(0, first - start) / QUERIES * QUERIES, tiles = len > first_query ? (len - first_query + QUERIES - 1) / QUERIES : 0, steps = tiles * group;
    const u32 k_tile = shared_address(shared), v_tile = k_tile + TILE, rows = v_tile + TILE;
    // Per row of a step: lse, then delta.
    float* infos = (float*)(shared + 2 * TILE + 4 * ROW_TILE);
    const auto q_tile = [&](int step) { return rows + step % 2 * (2 * ROW_TILE); };

    // The next step to copy: head and first query.
    int head = g * group, query = first_query, fetched = 0;
    const auto fetch = [&]() {
        if (fetched < steps) {
            const u32 to = q_tile(fetched);
            const auto at = [&](int i) { return ((u32)b * T + min(query + i, len - 1)) * H + head; };
            copy_rows<QUERIES, D, THREADS>(to, q, to + ROW_TILE, dout, at);
            float* info = infos + fetched % 2 * (2 * QUERIES);
            const int i = threadIdx.x % QUERIES;
            if (threadIdx.x < QUERIES) {
                // A row past the end has no weights.
                if (query + i < len) copy4(info + i, lse + at(i));
                else info[i] = infinity();
            } else if (threadIdx.x < 2 * QUERIES) {
                copy4(info + QUERIES + i, delta + at(i));
            }
            query += QUERIES;
            if (query >= len) query = first_query, head++;
        }
        copies_commit();
        fetched++;
    };
    if (steps > 0) {
        // Keys that no query sees are not read.
        const int seen = start + len;
        copy_rows<HERE, D, THREADS>(k_tile, k, v_tile, v, [&](int i) { return ((u32)b * S + min(first + i, seen - 1)) * G + g; });
    }
    fetch();
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2, warpgroup_row = warpgroup() * 64;
    // Queries before these do not see a thread's two keys.
    const int query0 = first + row - start, query1 = query0 + 8, unmasked = first + warpgroup_row + 63 - start;
    const float scale = LOG2E * rsqrtf((float)D);
    float dk_sum[D / 8][4] = {}, dv_sum[D / 8][4] = {};
    int first_of_step = first_query;
    for (int step = 0; step < steps; step++) {
        copies_wait<0>();
        __syncthreads();
        fetch();
        const u32 queries = q_tile(step), gradients = queries + ROW_TILE;
        const float* info = infos + step % 2 * (2 * QUERIES);
        float s[QUERIES / 8][4], ds[QUERIES / 8][4];
        u32 factors[QUERIES / 16][4];
        products_begin();
        product_of_tiles<D, HERE, QUERIES>(s, k_tile, warpgroup_row, queries);
        products_commit();
        product_of_tiles<D, HERE, QUERIES>(ds, v_tile, warpgroup_row, gradients);
        products_commit();
        products_wait<1>();
#pragma unroll
        for (int j = 0; j < QUERIES / 8; j++) {
            const float2 top = *(const float2*)&info[8 * j + column];
            s[j][0] = exp2_fast(s[j][0] * scale - top.x * LOG2E);
            s[j][1] = exp2_fast(s[j][1] * scale - top.y * LOG2E);
            s[j][2] = exp2_fast(s[j][2] * scale - top.x * LOG2E);
            s[j][3] = exp2_fast(s[j][3] * scale - top.y * LOG2E);
        }
        if (first_of_step < unmasked) {
#pragma unroll
            for (int j = 0; j < QUERIES / 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int here = first_of_step + 8 * j + column + e;
                    if (here < query0) s[j][e] = 0.0f;
                    if (here < query1) s[j][2 + e] = 0.0f;
                }
            }
        }
        to_fragments<QUERIES>(factors, s);
        products_begin();
        product_with_tile<QUERIES, D>(dv_sum, factors, gradients);
        products_commit();
        products_wait<1>();
#pragma unroll
        for (int j = 0; j < QUERIES / 8; j++) {
            const float2 d = *(const float2*)&info[QUERIES + 8 * j + column];
            s[j][0] *= ds[j][0] - d.x;
            s[j][1] *= ds[j][1] - d.y;
            s[j][2] *= ds[j][2] - d.x;
            s[j][3] *= ds[j][3] - d.y;
        }
        u32 more[QUERIES / 16][4];
        to_fragments<QUERIES>(more, s);
        products_begin();
        product_with_tile<QUERIES, D>(dk_sum, more, queries);
        products_commit();
        products_wait<0>();
        first_of_step += QUERIES;
        if (first_of_step >= len) first_of_step = first_query;
    }
    copies_wait<0>();
    __syncthreads();
    accumulators_to_tile<HERE, D>(shared, threadIdx.x / 32 * 16, dk_sum, rsqrtf((float)D), rsqrtf((float)D));
    accumulators_to_tile<HERE, D>(shared + TILE, threadIdx.x / 32 * 16, dv_sum, 1.0f, 1.0f);
    __syncthreads();
    const auto target = [&](int i) { return ((u32)b * S + first + i) * G + g; };
    store_rows<HERE, D, THREADS>(shared, dk, S - first, target);
    store_rows<HERE, D, THREADS>(shared + TILE, dv, S - first, target);
}
