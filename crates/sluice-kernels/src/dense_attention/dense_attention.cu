// Dense attention in f32 on the plain cores: for every head width up to 128 and for the f32 and TF32 modes. Follows attention_tile/walk_f32.cuh.
// [T, S] exists one tile at a time: the forward keeps a running maximum and sum per row, the backward recomputes. Every sum has one order.

// As `start`: every query sees every valid key.
constexpr u32 WHOLE = 1u << 30;

struct Shape {
    u32 t, s, h, g, d, start;

    // Keys that some query of a sequence of `len` sees.
    __device__ __forceinline__ u32 end(u32 len) const { return len == 0 || start == WHOLE ? len : start + len; }
};

// Rows `first..first + n` of head `head` of x [B, rows, heads, d] into a tile.
template <int N, int W>
__device__ __forceinline__ void load(float* tile, const float* __restrict__ x, u32 b, u32 rows, u32 heads, u32 head, u32 d, u32 first, u32 n) {
    load_rows<N, W>(tile, x, d, n, [&](u32 i) { return ((u64)b * rows + first + i) * heads + head; });
}

// out[i][j] += sum_q a[q][ty R + i] b[q][tx + 16 j], a [Q][K + 1], b [Q][W + 1]
template <int Q, int K, int W, int R, int C>
__device__ __forceinline__ void add_product_tn(float (&out)[R][C], const float* a, const float* b, u32 ty, u32 tx) {
#pragma unroll 4
    for (int q = 0; q < Q; q++) {
        float x[R], y[C];
#pragma unroll
        for (int i = 0; i < R; i++) x[i] = a[q * (K + 1) + ty * R + i];
#pragma unroll
        for (int j = 0; j < C; j++) y[j] = b[q * (W + 1) + tx + 16 * j];
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < C; j++) out[i][j] = fmaf(x[i], y[j], out[i][j]);
    }
}

// Grid: tiles of Q queries, heads, batch.
template <int W, int Q, int K>
__device__ __forceinline__ void forward(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                                        const u32* __restrict__ lens, float* __restrict__ o, float* __restrict__ lse, Shape p) {
    extern __shared__ float shared[];
    const u32 b = blockIdx.z, head = blockIdx.y, g = head / (p.h / p.g), first = (gridDim.x - 1 - blockIdx.x) * Q;
    const u32 len = lens[b], n = first < len ? min((u32)Q, len - first) : 0;  // valid queries of the tile
    const u32 n_keys = n ? min(p.start + first + n, p.end(len)) : 0;
    const auto at = [&](u32 i) { return ((u64)b * p.t + first + i) * p.h + head; };
    walk_over_keys<W, Q, K>(
        shared, q, k, v, o, lse, p.d, n, min((u32)Q, p.t - first), n_keys, at, [&](u32 slot) { return ((u64)b * p.s + slot) * p.g + g; },
        [&](u32 i, u32 slot) { return slot <= p.start + first + i; }, at);
}

// delta = dout . o per row; 0 for padding, whose dout may be anything. One warp per row.
KERNEL attention_delta(const float* __restrict__ dout, const float* __restrict__ o, const u32* __restrict__ lens, float* __restrict__ delta,
                       u32 n_rows, u32 t, u32 h, u32 d) {
    const u32 row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (row >= n_rows) return;
    const u32 token = row / h;
    float sum = 0.f;
    if (token % t < lens[token / t])
        for (u32 i = lane; i < d; i += 32) sum = fmaf(dout[(u64)row * d + i], o[(u64)row * d + i], sum);
    sum = warp_sum(sum);
    if (lane == 0) delta[row] = sum;
}

// Attention a and dz = a (dout . v - delta) of the tile's entries; 0 where the query is padding or the key is later.
template <int R, int C>
__device__ __forceinline__ void gradient_of_logits(const float (&z)[R][C], const float (&da)[R][C], const float* row_lse, const float* row_delta,
                                                   u32 first, u32 n, u32 key, u32 n_keys, u32 start, float scale, u32 ty, u32 tx, float (&a)[R][C],
                                                   float (&dz)[R][C]) {
#pragma unroll
    for (int i = 0; i < R; i++) {
        const u32 r = ty * R + i;
#pragma unroll
        for (int j = 0; j < C; j++) {
            const bool seen = r < n && tx + 16 * j < n_keys && key + tx + 16 * j <= start + first + r;
            a[i][j] = seen ? expf(z[i][j] * scale - row_lse[r]) : 0.f;
            dz[i][j] = seen ? a[i][j] * (da[i][j] - row_delta[r]) : 0.f;
        }
    }
}

// Grid: tiles of Q queries, heads, batch. Shared: 2 Q and K rows of W + 1, Q rows of K + 1, 2 Q numbers.
template <int W, int Q, int K>
__device__ __forceinline__ void query_gradient(const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,
                                               const float* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,
                                               const u32* __restrict__ lens, float* __restrict__ dq, Shape p) {
    constexpr int R = Q / 16, C = K / 16, D = W / 16;
    extern __shared__ float shared[];
    float *tile_q = shared, *tile_do = tile_q + Q * (W + 1), *tile_kv = tile_do + Q * (W + 1), *tile_dz = tile_kv + K * (W + 1);
    float *row_lse = tile_dz + Q * (K + 1), *row_delta = row_lse + Q;
    const u32 ty = threadIdx.x >> 4, tx = threadIdx.x & 15;
    const u32 b = blockIdx.z, head = blockIdx.y, g = head / (p.h / p.g), first = (gridDim.x - 1 - blockIdx.x) * Q;
    const u32 len = lens[b], n = first < len ? min((u32)Q, len - first) : 0;
    const float scale = rsqrtf((float)p.d);
    float out[R][D];
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < D; j++) out[i][j] = 0.f;
    load<Q, W>(tile_q, q, b, p.t, p.h, head, p.d, first, n);
    load<Q, W>(tile_do, dout, b, p.t, p.h, head, p.d, first, n);
    for (u32 i = threadIdx.x; i < n; i += THREADS) {
        const u64 row = ((u64)b * p.t + first + i) * p.h + head;
        row_lse[i] = lse[row], row_delta[i] = delta[row];
    }
    const u32 n_keys = n ? min(p.start + first + n, p.end(len)) : 0;
    for (u32 key = 0; key < n_keys; key += K) {
        const u32 n_here = min((u32)K, n_keys - key);
        float z[R][C], da[R][C], a[R][C], dz[R][C];
        __syncthreads();
        load<K, W>(tile_kv, v, b, p.s, p.g, g, p.d, key, n_here);
        __syncthreads();
        product_nt<W>(da, tile_do, tile_kv, ty, tx);
        __syncthreads();
        load<K, W>(tile_kv, k, b, p.s, p.g, g, p.d, key, n_here);
        __syncthreads();
        product_nt<W>(z, tile_q, tile_kv, ty, tx);
        gradient_of_logits(z, da, row_lse, row_delta, first, n, key, n_here, p.start, scale, ty, tx, a, dz);
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < C; j++) tile_dz[(ty * R + i) * (K + 1) + tx + 16 * j] = dz[i][j];
        __syncthreads();
        add_product_nn<K, W>(out, tile_dz, tile_kv, ty, tx);
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        const u32 t = first + ty * R + i;
        if (t >= p.t) continue;
#pragma unroll
        for (int j = 0; j < D; j++)
            if (tx + 16 * j < p.d) dq[(((u64)b * p.t + t) * p.h + head) * p.d + tx + 16 * j] = out[i][j] * scale;
    }
}

// Grid: tiles of K keys, KV heads, batch. A block adds up what all queries of all its heads say, in order.
// Shared: 2 K and 2 Q rows of W + 1, Q rows of K + 1, 2 Q numbers.
template <int W, int Q, int K>
__device__ __forceinline__ void key_gradient(const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,
                                             const float* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,
                                             const u32* __restrict__ lens, float* __restrict__ dk, float* __restrict__ dv, Shape p) {
    constexpr int R = Q / 16, C = K / 16, D = W / 16;
    extern __shared__ float shared[];
    float *tile_k = shared, *tile_v = tile_k + K * (W + 1), *tile_q = tile_v + K * (W + 1), *tile_do = tile_q + Q * (W + 1);
    float *tile_a = tile_do + Q * (W + 1), *row_lse = tile_a + Q * (K + 1), *row_delta = row_lse + Q;
    const u32 ty = threadIdx.x >> 4, tx = threadIdx.x & 15;
    const u32 b = blockIdx.z, g = blockIdx.y, group = p.h / p.g, key = blockIdx.x * K;
    const u32 len = lens[b], seen = p.end(len);
    const u32 n_here = key < seen ? min((u32)K, seen - key) : 0;
    const float scale = rsqrtf((float)p.d);
    float out_k[C][D], out_v[C][D];
#pragma unroll
    for (int i = 0; i < C; i++)
#pragma unroll
        for (int j = 0; j < D; j++) out_k[i][j] = out_v[i][j] = 0.f;
    if (n_here) {
        load<K, W>(tile_k, k, b, p.s, p.g, g, p.d, key, n_here);
        load<K, W>(tile_v, v, b, p.s, p.g, g, p.d, key, n_here);
        const u32 from = key > p.start ? (key - p.start) / Q * Q : 0;
        for (u32 head = g * group; head < (g + 1) * group; head++) {
            for (u32 first = from; first < len; first += Q) {
                const u32 n = min((u32)Q, len - first);
                __syncthreads();
                load<Q, W>(tile_q, q, b, p.t, p.h, head, p.d, first, n);
                load<Q, W>(tile_do, dout, b, p.t, p.h, head, p.d, first, n);
                for (u32 i = threadIdx.x; i < n; i += THREADS) {
                    const u64 row = ((u64)b * p.t + first + i) * p.h + head;
                    row_lse[i] = lse[row], row_delta[i] = delta[row];
                }
                __syncthreads();
                float z[R][C], da[R][C], a[R][C], dz[R][C];
                product_nt<W>(z, tile_q, tile_k, ty, tx);
                product_nt<W>(da, tile_do, tile_v, ty, tx);
                gradient_of_logits(z, da, row_lse, row_delta, first, n, key, n_here, p.start, scale, ty, tx, a, dz);
#pragma unroll
                for (int i = 0; i < R; i++)
#pragma unroll
                    for (int j = 0; j < C; j++) tile_a[(ty * R + i) * (K + 1) + tx + 16 * j] = a[i][j];
                __syncthreads();
                add_product_tn<Q, K, W>(out_v, tile_a, tile_do, ty, tx);
                __syncthreads();
#pragma unroll
                for (int i = 0; i < R; i++)
#pragma unroll
                    for (int j = 0; j < C; j++) tile_a[(ty * R + i) * (K + 1) + tx + 16 * j] = dz[i][j];
                __syncthreads();
                add_product_tn<Q, K, W>(out_k, tile_a, tile_q, ty, tx);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < C; i++) {
        const u32 row = key + ty * C + i;
        if (row >= p.s) continue;
#pragma unroll
        for (int j = 0; j < D; j++) {
            const u32 c = tx + 16 * j;
            const u64 at = (((u64)b * p.s + row) * p.g + g) * p.d + c;
            if (c < p.d) dk[at] = out_k[i][j] * scale, dv[at] = out_v[i][j];
        }
    }
}

#define FORWARD(name, W, Q, K)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) name(const float* q, const float* k, const float* v, const u32* lens, float* o,    \
                                                           float* lse, u32 t, u32 s, u32 h, u32 g, u32 d, u32 start) {                   \
        forward<W, Q, K>(q, k, v, lens, o, lse, {t, s, h, g, d, start});                                                                 \
    }
#define QUERY_GRADIENT(name, W, Q, K)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                                    \
        name(const float* dout, const float* q, const float* k, const float* v, const float* lse, const float* delta, const u32* lens,   \
             float* dq, u32 t, u32 s, u32 h, u32 g, u32 d, u32 start) {                                                                  \
        query_gradient<W, Q, K>(dout, q, k, v, lse, delta, lens, dq, {t, s, h, g, d, start});                                            \
    }
#define KEY_GRADIENT(name, W, Q, K)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                                    \
        name(const float* dout, const float* q, const float* k, const float* v, const float* lse, const float* delta, const u32* lens,   \
             float* dk, float* dv, u32 t, u32 s, u32 h, u32 g, u32 d, u32 start) {                                                       \
        key_gradient<W, Q, K>(dout, q, k, v, lse, delta, lens, dk, dv, {t, s, h, g, d, start});                                          \
    }

FORWARD(forward_64, 64, 64, 64)
FORWARD(forward_128, 128, 64, 64)
QUERY_GRADIENT(query_gradient_64, 64, 64, 64)
QUERY_GRADIENT(query_gradient_128, 128, 32, 64)
KEY_GRADIENT(key_gradient_64, 64, 64, 64)
KEY_GRADIENT(key_gradient_128, 128, 32, 32)
