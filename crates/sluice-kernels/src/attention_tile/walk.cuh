// Forward pass of a tile of rows that walks over a list of keys, KEYS at a time. Follows attention_tile/tile.cuh.
// Knows nothing about which keys a row sees.
//
// Copies run a step ahead of the products, the first product of a step a step ahead of the last one, so that the matrix unit works
// while a warp computes weights (FlashAttention-3, section 3.2).

constexpr int KEYS = 64;
constexpr int KEY_TILE = KEYS * D * 2;

// A warp's raw logits of a step.
using Logits = float[KEYS / 8][4];

// The first of the two rows of a tile that a thread's accumulators have; the other one is 8 further on.
__device__ __forceinline__ int row_of_thread() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }

// `x [.., D]` zero and one number a row for the rows of a tile that are padding, from `n_rows` (which may be negative) to `end`.
template <int THREADS, class At>
__device__ __forceinline__ void write_padding(bf16* x, float* y, float value, int n_rows, int end, At at) {
    const int begin = max(n_rows, 0);
    for (int i = begin * (D / 8) + threadIdx.x; i < end * (D / 8); i += THREADS) {
        *(uint4*)(x + (u64)at(i / (D / 8)) * D + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
    }
    for (int i = begin + threadIdx.x; i < end; i += THREADS) y[at(i)] = value;
}

// o and lse (natural logarithm) of the first `n_rows` rows of a tile of 64 for every warpgroup, in `steps` > 0 steps. Row `i` of the tile is row
// `query(i)` of q and `at(i)` of the results; `key(step, i)` is the row of a step's key in k and v, a valid one behind the last too.
// `mask(s, step)` makes -inf of the logits that a thread's rows do not see; over all steps every row sees a key.
// Dynamic shared memory: a tile of rows and four of keys.
template <int WARPGROUPS, class Query, class Key, class Mask, class At>
__device__ __forceinline__ void walk_over_keys(unsigned char* shared, const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse, int steps,
                                               int n_rows, Query query, Key key, Mask mask, At at) {
    constexpr int ROWS = WARPGROUPS * 64, THREADS = WARPGROUPS * 128;
    const u32 q_tile = shared_address(shared), kv = q_tile + ROWS * D * 2;
    const auto k_tile = [&](int step) { return kv + step % 2 * KEY_TILE; };
    const auto v_tile = [&](int step) { return kv + (2 + step % 2) * KEY_TILE; };
    // The keys of a step, and the values of the one before.
    const auto fetch = [&](int step) {
        if (step < steps) copy_rows<KEYS, D, THREADS>(k_tile(step), k, [&](int i) { return key(step, i); });
        if (step > 0) copy_rows<KEYS, D, THREADS>(v_tile(step - 1), v, [&](int i) { return key(step - 1, i); });
        copies_commit();
    };
    copy_rows<ROWS, D, THREADS>(q_tile, q, query);
    fetch(0);
    fetch(1);
    copies_wait<1>();
    __syncthreads();

    const int row = row_of_thread(), warpgroup_row = warpgroup() * 64;
    const float scale = LOG2E * rsqrtf((float)D);
    float out[D / 8][4] = {};
    OnlineSoftmax softmax;
    Logits s;
    u32 weights[KEYS / 16][4];

    const auto weigh = [&](int step) {
        mask(s, step);
        softmax.weigh(s, scale);
    };
    products_begin();
    product_of_tiles<D, ROWS, KEYS>(s, q_tile, warpgroup_row, k_tile(0));
    products_commit();
    products_wait<0>();
    weigh(0);
    for (int step = 1; step < steps; step++) {
        // The wait for the product of the turn before stands here, a branch away from the work that runs beside that
        // product: within one straight piece of code the compiler puts the wait first.
        products_wait<0>();
        copies_wait<0>();
        __syncthreads();
        to_fragments<KEYS>(weights, s);
        softmax.shrink(out);
        fetch(step + 1);
        products_begin();
        product_of_tiles<D, ROWS, KEYS>(s, q_tile, warpgroup_row, k_tile(step));
        products_commit();
        product_with_tile<KEYS, D>(out, weights, v_tile(step - 1));
        products_commit();
        products_wait<1>();
        weigh(step);
    }
    products_wait<0>();
    copies_wait<0>();
    __syncthreads();
    to_fragments<KEYS>(weights, s);
    softmax.shrink(out);
    products_begin();
    product_with_tile<KEYS, D>(out, weights, v_tile(steps - 1));
    products_commit();
    products_wait<0>();
    const float sum0 = quad_sum(softmax.sum0), sum1 = quad_sum(softmax.sum1);
    // The rows of a warp in the tile of queries are its own.
    accumulators_to_tile<ROWS, D>(shared, threadIdx.x / 32 * 16, out, 1.0f / sum0, 1.0f / sum1);
    if (threadIdx.x % 4 == 0) {
        if (row < n_rows) lse[at(row)] = (softmax.max0 * scale + log2f(sum0)) / LOG2E;
        if (row + 8 < n_rows) lse[at(row + 8)] = (softmax.max1 * scale + log2f(sum1)) / LOG2E;
    }
    __syncthreads();
    store_rows<ROWS, D, THREADS>(shared, o, n_rows, at);
}
