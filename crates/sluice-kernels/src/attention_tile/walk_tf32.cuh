// Forward pass of 64 queries of one head that walk over a list of keys, KEYS at a time: factors rounded to TF32 (11 bits), sums and softmax in f32.
// Compiled with HEAD_DIM, 32 or 64. Knows nothing about which keys a query sees.
//
// A warp has 16 of the queries (FlashAttention-2, arXiv 2307.08691). Keys and values are copied two steps ahead and go to the matrix unit as they are: it
// ignores the bits that are too many. Products are mma.m16n8k8: with g = lane / 4 and t = lane % 4, a thread holds of the left factor rows g, g + 8 and
// columns t, t + 4, of the right factor rows t, t + 4 of column g, of the result rows g, g + 8 and columns 2 t, 2 t + 1. Weights become a left factor
// without moving: a sum over keys has no order, so "columns t and t + 4" may as well be keys 2 t and 2 t + 1, if the values are read so too.

constexpr int D = HEAD_DIM, ROWS = 64, KEYS = 64, THREADS = 128;
// Rows four words further on than a whole number of banks: both ways of reading a tile meet every bank once.
constexpr int STRIDE = D + 4;
constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ u32 to_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// Asynchronous copy of 16 bytes.
__device__ __forceinline__ void copy16(u32 to, const float* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Over the four threads that share a row of a result.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// A thread's first query, counted from the block's; its other one is 8 further on.
__device__ __forceinline__ int query_of_thread() { return (threadIdx.x >> 5) * 16 + (threadIdx.x % 32 >> 2); }

// o [B, T, H, D] and lse [B, T, H] (natural logarithm) of the queries `first..first + ROWS` of head `h` in sequence `b`, in `steps` steps; those from
// `n_queries` on are padding. From a token to the next are q_heads heads of q and kv_heads of k and v. `position(slot)` is that of a key, a valid one
// behind the last slot too. `mask(s, step)` makes -inf of the logits that a thread's queries do not see; over all steps every query that is not padding
// sees a key.
// Dynamic shared memory: of either of two stages a tile of keys, then one of values.
template <class Position, class Mask>
__device__ __forceinline__ void walk_over_keys(u32* tiles, const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                                               float* __restrict__ o, float* __restrict__ lse, int b, int h, int first, int n_queries, int T, int H,
                                               int kv_head, int q_heads, int kv_heads, int steps, Position position, Mask mask) {
    constexpr int TILE = KEYS * STRIDE;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, row0 = first + query_of_thread(), row1 = row0 + 8;
    const auto at = [&](int row) { return ((u64)b * T + row) * H + h; };

    const auto fetch = [&](int step) {
        if (step < steps) {
            const u32 to = (u32)__cvta_generic_to_shared(tiles + (step & 1) * 2 * TILE);
            for (int i = threadIdx.x; i < KEYS * (D / 4); i += THREADS) {
                const int key = i / (D / 4), column = i % (D / 4) * 4;
                const u64 from = (((u64)b * T + position(step * KEYS + key)) * kv_heads + kv_head) * D + column;
                copy16(to + (key * STRIDE + column) * 4, k + from);
                copy16(to + (TILE + key * STRIDE + column) * 4, v + from);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    fetch(0);
    fetch(1);
    u32 queries[D / 8][4];
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int row = e & 1 ? row1 : row0, column = 8 * i + t + (e >> 1) * 4;
            queries[i][e] = row < n_queries ? to_tf32(q[(((u64)b * T + row) * q_heads + h) * D + column]) : 0u;
        }
    }
    const float scale = LOG2E * rsqrtf((float)D);
    // Maxima begin below any logit, but finite: a query may see nothing in its first steps.
    float out[D / 8][4] = {}, max0 = -3e38f, max1 = -3e38f, sum0 = 0.f, sum1 = 0.f;
    for (int step = 0; step < steps; step++) {
        const u32 *k_tile = tiles + (step & 1) * 2 * TILE, *v_tile = k_tile + TILE;
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncthreads();
        float s[KEYS / 8][4];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
            s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.f;
            const u32* key = &k_tile[(8 * j + g) * STRIDE + t];
#pragma unroll
            for (int i = 0; i < D / 8; i++) mma(s[j], queries[i], key[8 * i], key[8 * i + 4]);
        }
        mask(s, step);
        float new0 = max0, new1 = max1;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
            new0 = fmaxf(new0, fmaxf(s[j][0], s[j][1]));
            new1 = fmaxf(new1, fmaxf(s[j][2], s[j][3]));
        }
        new0 = quad_max(new0), new1 = quad_max(new1);
        const float top0 = new0 * scale, top1 = new1 * scale;
        const float shrink0 = exp2_fast(max0 * scale - top0), shrink1 = exp2_fast(max1 * scale - top1);
        max0 = new0, max1 = new1;
        sum0 *= shrink0, sum1 *= shrink1;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            out[i][0] *= shrink0, out[i][1] *= shrink0;
            out[i][2] *= shrink1, out[i][3] *= shrink1;
        }
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
            s[j][0] = exp2_fast(s[j][0] * scale - top0), s[j][1] = exp2_fast(s[j][1] * scale - top0);
            s[j][2] = exp2_fast(s[j][2] * scale - top1), s[j][3] = exp2_fast(s[j][3] * scale - top1);
            sum0 += s[j][0] + s[j][1];
            sum1 += s[j][2] + s[j][3];
            const u32 weights[4] = {to_tf32(s[j][0]), to_tf32(s[j][2]), to_tf32(s[j][1]), to_tf32(s[j][3])};
            const u32* value = &v_tile[(8 * j + 2 * t) * STRIDE + g];
#pragma unroll
            for (int i = 0; i < D / 8; i++) mma(out[i], weights, value[8 * i], value[STRIDE + 8 * i]);
        }
        __syncthreads();
        fetch(step + 2);
    }
    sum0 = quad_sum(sum0), sum1 = quad_sum(sum1);
    const auto write = [&](int row, int e, float top, float sum) {
        if (row >= T) return;
        const bool valid = row < n_queries;
        const float inv = valid ? 1.f / sum : 0.f;
        float* to = o + at(row) * D + 2 * t;
#pragma unroll
        for (int i = 0; i < D / 8; i++) *(float2*)(to + 8 * i) = valid ? make_float2(out[i][e] * inv, out[i][e + 1] * inv) : make_float2(0.f, 0.f);
        if (t == 0) lse[at(row)] = valid ? (top * scale + log2f(sum)) / LOG2E : -INF;
    };
    write(row0, 0, max0, sum0);
    write(row1, 2, max1, sum1);
}
