// Attention of Q queries of one head that walk over a list of keys, K at a time, in f32 on the plain cores: for every head width up to W. [T, S]
// exists one tile at a time (FlashAttention-2, arXiv 2307.08691), with a running maximum and sum per row. Knows nothing about which keys a query sees.
//
// 256 threads are 16 x 16; thread (ty, tx) has rows ty * R + i and columns tx + 16 j of every product. Every sum has one order.

constexpr u32 THREADS = 256;

// Rows `row(0..n)` of x [.., d] into tile [N][W + 1], zeros beyond: rows that nobody may see may be NaN.
template <int N, int W, class Row>
__device__ __forceinline__ void load_rows(float* tile, const float* __restrict__ x, u32 d, u32 n, Row row) {
    for (u32 i = threadIdx.x; i < N * W; i += THREADS) {
        const u32 r = i / W, c = i % W;
        tile[r * (W + 1) + c] = r < n && c < d ? x[row(r) * d + c] : 0.f;
    }
}

// out[i][j] = sum_c a[ty R + i][c] b[tx + 16 j][c]
template <int W, int R, int C>
__device__ __forceinline__ void product_nt(float (&out)[R][C], const float* a, const float* b, u32 ty, u32 tx) {
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < C; j++) out[i][j] = 0.f;
#pragma unroll 8
    for (int c = 0; c < W; c++) {
        float x[R], y[C];
#pragma unroll
        for (int i = 0; i < R; i++) x[i] = a[(ty * R + i) * (W + 1) + c];
#pragma unroll
        for (int j = 0; j < C; j++) y[j] = b[(tx + 16 * j) * (W + 1) + c];
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < C; j++) out[i][j] = fmaf(x[i], y[j], out[i][j]);
    }
}

// out[i][j] += sum_k a[ty R + i][k] b[k][tx + 16 j], a [.][K + 1], b [K][W + 1]
template <int K, int W, int R, int C>
__device__ __forceinline__ void add_product_nn(float (&out)[R][C], const float* a, const float* b, u32 ty, u32 tx) {
#pragma unroll 4
    for (int k = 0; k < K; k++) {
        float x[R], y[C];
#pragma unroll
        for (int i = 0; i < R; i++) x[i] = a[(ty * R + i) * (K + 1) + k];
#pragma unroll
        for (int j = 0; j < C; j++) y[j] = b[k * (W + 1) + tx + 16 * j];
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < C; j++) out[i][j] = fmaf(x[i], y[j], out[i][j]);
    }
}

__device__ __forceinline__ float sum16(float x) {
#pragma unroll
    for (int d = 8; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

__device__ __forceinline__ float max16(float x) {
#pragma unroll
    for (int d = 8; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

// o and lse (natural logarithm) of a tile of queries, of which the first `n` are valid and `n_padded` exist in memory. Query `i` is row `query(i)`
// of q and `at(i)` of the results, key `slot` of `n_keys` row `key(slot)` of k and v, and `sees(i, slot)` says whether it counts; a valid query sees some key.
// Shared memory: Q and K rows of W + 1, Q rows of K + 1.
template <int W, int Q, int K, class Query, class Key, class Sees, class At>
__device__ __forceinline__ void walk_over_keys(float* shared, const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                                               float* __restrict__ o, float* __restrict__ lse, u32 d, u32 n, u32 n_padded, u32 n_keys, Query query,
                                               Key key, Sees sees, At at) {
    constexpr int R = Q / 16, C = K / 16, D = W / 16;
    float *tile_q = shared, *tile_kv = tile_q + Q * (W + 1), *tile_p = tile_kv + K * (W + 1);
    const u32 ty = threadIdx.x >> 4, tx = threadIdx.x & 15;
    const float scale = rsqrtf((float)d);
    // Maxima begin below any logit, but finite: a query may see nothing in its first steps.
    float out[R][D], top[R], sum[R];
#pragma unroll
    for (int i = 0; i < R; i++) {
        top[i] = -3e38f, sum[i] = 0.f;
#pragma unroll
        for (int j = 0; j < D; j++) out[i][j] = 0.f;
    }
    load_rows<Q, W>(tile_q, q, d, n, query);
    for (u32 first = 0; first < n_keys; first += K) {
        const u32 n_here = min((u32)K, n_keys - first);
        const auto key_here = [&](u32 i) { return key(first + i); };
        __syncthreads();
        load_rows<K, W>(tile_kv, k, d, n_here, key_here);
        __syncthreads();
        float z[R][C];
        product_nt<W>(z, tile_q, tile_kv, ty, tx);
#pragma unroll
        for (int i = 0; i < R; i++) {
            float most = top[i];
#pragma unroll
            for (int j = 0; j < C; j++) {
                z[i][j] = tx + 16 * j < n_here && sees(ty * R + i, first + tx + 16 * j) ? z[i][j] * scale : -INF;
                most = fmaxf(most, z[i][j]);
            }
            most = max16(most);
            const float keep = expf(top[i] - most);
            float more = 0.f;
#pragma unroll
            for (int j = 0; j < C; j++) {
                const float a = expf(z[i][j] - most);
                more += a;
                tile_p[(ty * R + i) * (K + 1) + tx + 16 * j] = a;
            }
            sum[i] = sum[i] * keep + sum16(more);
            top[i] = most;
#pragma unroll
            for (int j = 0; j < D; j++) out[i][j] *= keep;
        }
        __syncthreads();
        load_rows<K, W>(tile_kv, v, d, n_here, key_here);
        __syncthreads();
        add_product_nn<K, W>(out, tile_p, tile_kv, ty, tx);
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        const u32 row = ty * R + i;
        if (row >= n_padded) continue;
        const bool valid = row < n;
        if (tx == 0) lse[at(row)] = valid ? top[i] + logf(sum[i]) : -INF;
#pragma unroll
        for (int j = 0; j < D; j++)
            if (tx + 16 * j < d) o[at(row) * d + tx + 16 * j] = valid ? out[i][j] / sum[i] : 0.f;
    }
}
