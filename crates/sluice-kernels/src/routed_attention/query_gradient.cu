// Routed attention by blocks of queries: the gradient of the queries. Follows routed_attention.cu.
//
// A step's first two products run a step ahead of the third, so that the matrix unit works while a warp computes
// weights (FlashAttention-3, section 3.2); the forward pass has several blocks of threads on a multiprocessor for that.
// A tile asks for all that it must know before it waits for any of it: with few blocks of threads on a multiprocessor
// nothing else hides those waits.

// A thread's quarter of a row of `o` and `dout`, whose products add up to delta.
struct RowProducts {
    uint4 o[D / 32], dout[D / 32];

    __device__ __forceinline__ void load(const bf16* o_rows, const bf16* dout_rows, u32 row) {
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            const u64 at = (u64)row * D + (i * 4 + threadIdx.x % 4) * 8;
            o[i] = *(const uint4*)(o_rows + at);
            dout[i] = *(const uint4*)(dout_rows + at);
        }
    }

    __device__ __forceinline__ float sum() const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            const u32 xs[4] = {o[i].x, o[i].y, o[i].z, o[i].w}, ys[4] = {dout[i].x, dout[i].y, dout[i].z, dout[i].w};
#pragma unroll
            for (int e = 0; e < 4; e++) sum += low_float(xs[e]) * low_float(ys[e]) + high_float(xs[e]) * high_float(ys[e]);
        }
        return sum;
    }
};

// dq [B, T, H, D], and delta [B, T, H] = sum of dout * o, which the gradients of keys and values need too.
extern "C" __global__ __launch_bounds__(THREADS, DQ_CTAS) void routed_attention_dq(
    const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const bf16* o, const float* lse, const float* scores, const int* indices, const float* tau,
    const int* lens, bf16* dq, float* delta, int T, int G, int n_blocks, int n_places, int window, int every, float inverse_temperature, int group, u32 reciprocal) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const Place p = place(lens, T, n_blocks, every, {group, reciprocal});
    if (p.n_padded <= 0) return;
    if (p.n_rows <= 0) {
        for (int i = threadIdx.x; i < p.n_padded * (D / 8); i += THREADS) *(uint4*)(dq + (u64)p.at(i / (D / 8), T, G) * D + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
        for (int i = threadIdx.x; i < p.n_padded; i += THREADS) delta[p.at(i, T, G)] = 0.0f;
        return;
    }
    const u32 q_tile = shared_address(shared), dout_tile = q_tile + Layout::row_tile, kv = dout_tile + Layout::row_tile;
    int* rows = (int*)(shared + 2 * Layout::row_tile + 5 * Layout::key_tile);
    float* bias = scores ? (float*)(rows + n_places) : nullptr;

    // Everything that a tile must know is asked for before anything is waited for.
    Early early;
    early.load(p, indices, G, n_blocks, n_places);
    copy_rows<ROWS, D, THREADS>(q_tile, q, dout_tile, dout, [&](int i) { return p.at(min(i, p.n_rows - 1), T, G); });
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    const u32 at0 = p.at(min(row, p.n_rows - 1), T, G), at1 = p.at(min(row + 8, p.n_rows - 1), T, G);
    const float lse0 = lse[at0], lse1 = lse[at1];
    RowProducts products0, products1;
    products0.load(o, dout, at0), products1.load(o, dout, at1);
    const Keys keys = list_keys(p, early, rows, bias, indices, tau, scores, T, G, n_blocks, n_places, window, inverse_temperature);
    const int steps = (keys.n + KEYS - 1) / KEYS, warpgroup_row = warpgroup() * 64;
    const auto k_tile = [&](int step) { return kv + step % 3 * Layout::key_tile; };
    const auto v_tile = [&](int step) { return kv + (3 + step % 2) * Layout::key_tile; };
    const auto fetch = [&](int step) {
        copy_rows<KEYS, D, THREADS>(k_tile(step), k, v_tile(step), v, [&](int i) { return key_row(keys, p, step * KEYS + i, T, G); });
        copies_commit();
    };
    fetch(0);
    fetch(1);
    const float delta0 = quad_sum(products0.sum()), delta1 = quad_sum(products1.sum());
    if (lane % 4 == 0) {
        if (row < p.n_padded) delta[p.at(row, T, G)] = row < p.n_rows ? delta0 : 0.0f;
        if (row + 8 < p.n_padded) delta[p.at(row + 8, T, G)] = row + 8 < p.n_rows ? delta1 : 0.0f;
    }
    // Rows that are padding have no weights.
    const float top0 = row < p.n_rows ? lse0 * LOG2E : infinity(), top1 = row + 8 < p.n_rows ? lse1 * LOG2E : infinity();
    copies_wait<1>();
    __syncthreads();

    const int limit0 = last_slot(p, keys, row), limit1 = last_slot(p, keys, row + 8);
    const int first_masked = (last_slot(p, keys, 0) + 1) / KEYS;
    const float scale = LOG2E * rsqrtf((float)D);
    float out[D / 8][4] = {};

    Logits s, ds;
    u32 factors[KEYS / 16][4];
    const auto start = [&](int step) {
        products_begin();
        product_of_tiles<D, ROWS, KEYS>(s, q_tile, warpgroup_row, k_tile(step));
        product_of_tiles<D, ROWS, KEYS>(ds, dout_tile, warpgroup_row, v_tile(step));
        products_commit();
    };
    const auto logit_gradients = [&](int step) {
        bias_and_mask(s, keys, bias, step, first_masked, limit0, limit1);
        logits_to_gradients(s, ds, scale, top0, top1, delta0, delta1);
    };
    start(0);
    products_wait<0>();
    logit_gradients(0);
    for (int step = 1; step < steps; step++) {
        // The wait for the product of the turn before stands here, a branch away from the work that runs beside that
        // product: within one straight piece of code the compiler puts the wait first.
        products_wait<0>();
        copies_wait<0>();
        __syncthreads();
        to_fragments<KEYS>(factors, s);
        start(step);
        product_with_tile<KEYS, D>(out, factors, k_tile(step - 1));
        products_commit();
        fetch(step + 1);
        products_wait<1>();
        logit_gradients(step);
    }
    products_wait<0>();
    to_fragments<KEYS>(factors, s);
    products_begin();
    product_with_tile<KEYS, D>(out, factors, k_tile(steps - 1));
    products_commit();
    products_wait<0>();
    __syncthreads();
    accumulators_to_tile<ROWS, D>(shared, threadIdx.x / 32 * 16, out, rsqrtf((float)D), rsqrtf((float)D));
    __syncthreads();
    store_rows<ROWS, D, THREADS>(shared, dq, p.n_rows, [&](int i) { return p.at(i, T, G); });
    for (int i = p.n_rows * (D / 8) + threadIdx.x; i < p.n_padded * (D / 8); i += THREADS) {
        *(uint4*)(dq + (u64)p.at(i / (D / 8), T, G) * D + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
    }
}
