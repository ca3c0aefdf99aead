// Attention of an encoder with factors rounded to TF32 (11 bits), sums and softmax in f32; forward only. Compiled with HEAD_DIM, 32 or 64.
//
// A block has 64 queries of one head, a warp 16 of them, and walks over tiles of 64 keys (FlashAttention-2, arXiv 2307.08691), which are copied two
// steps ahead. Keys and values go to the matrix unit as they are: it ignores the bits that are too many. Products are
// mma.m16n8k8: with g = lane / 4 and t = lane % 4, a thread holds of the left factor rows g, g + 8 and columns t, t + 4, of the right factor
// rows t, t + 4 of column g, of the result rows g, g + 8 and columns 2 t, 2 t + 1. Weights become a left factor without moving: a sum over keys has
// no order, so "columns t and t + 4" may as well be keys 2 t and 2 t + 1, if the values are read so too.

constexpr int D = HEAD_DIM, ROWS = 64, KEYS = 64;
// Rows four words further on than a whole number of banks: both ways of reading a tile meet every bank once.
constexpr int STRIDE = D + 4;
constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ u32 to_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// Asynchronous copy of 16 bytes, or of as many zeros.
__device__ __forceinline__ void copy16(u32 to, const float* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
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

// q, o [B, T, H, D], k, v [B, T, G, D], lse [B, T, H]; from a token to the next are q_heads heads of q and kv_heads of k and v. Grid: x = sequences
// times heads, y = tiles of queries.
extern "C" __global__ __launch_bounds__(128, 3) void whole_tf32_fwd(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                                                                    const int* __restrict__ lens, float* __restrict__ o, float* __restrict__ lse, int T, int H, int G, int q_heads,
                                                                    int kv_heads) {
    // Of either stage a tile of keys, then one of values.
    extern __shared__ __align__(16) u32 tiles[];
    constexpr int TILE = KEYS * STRIDE;
    const int b = blockIdx.x / H, h = blockIdx.x % H, kv_head = h / (H / G), len = lens[b];
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int row0 = blockIdx.y * ROWS + (threadIdx.x >> 5) * 16 + g, row1 = row0 + 8;
    const auto at = [&](int row) { return ((u64)b * T + row) * H + h; };

    // Tiles without a valid query have no keys to visit.
    const int steps = blockIdx.y * ROWS < len ? (len + KEYS - 1) / KEYS : 0;
    const auto fetch = [&](int step) {
        if (step < steps) {
            const u32 to = (u32)__cvta_generic_to_shared(tiles + (step & 1) * 2 * TILE);
            for (int i = threadIdx.x; i < KEYS * (D / 4); i += 128) {
                const int key = i / (D / 4), column = i % (D / 4) * 4;
                // What lies behind the last key may be NaN, and a weight of zero would not hide it.
                const bool there = step * KEYS + key < len;
                const u64 from = (((u64)b * T + (there ? step * KEYS + key : 0)) * kv_heads + kv_head) * D + column;
                copy16(to + (key * STRIDE + column) * 4, k + from, there);
                copy16(to + (TILE + key * STRIDE + column) * 4, v + from, there);
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
            queries[i][e] = row < len ? to_tf32(q[(((u64)b * T + row) * q_heads + h) * D + column]) : 0u;
        }
    }
    const float scale = LOG2E * rsqrtf((float)D);
    float out[D / 8][4] = {}, max0 = -INF, max1 = -INF, sum0 = 0.f, sum1 = 0.f;
    for (int step = 0; step < steps; step++) {
        const int first = step * KEYS;
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
        float new0 = max0, new1 = max1;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (first + 8 * j + 2 * t + e >= len) s[j][e] = s[j][2 + e] = -INF;
            }
            new0 = fmaxf(new0, fmaxf(s[j][0], s[j][1]));
            new1 = fmaxf(new1, fmaxf(s[j][2], s[j][3]));
        }
        // Every tile has a valid key, so the maxima are finite.
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
        const bool valid = row < len;
        const float inv = valid ? 1.f / sum : 0.f;
        float* to = o + at(row) * D + 2 * t;
#pragma unroll
        for (int i = 0; i < D / 8; i++) *(float2*)(to + 8 * i) = valid ? make_float2(out[i][e] * inv, out[i][e + 1] * inv) : make_float2(0.f, 0.f);
        if (t == 0) lse[at(row)] = valid ? (top * scale + log2f(sum)) / LOG2E : -INF;
    };
    write(row0, 0, max0, sum0);
    write(row1, 2, max1, sum1);
}
