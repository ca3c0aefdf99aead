// One warp per row; lanes take every 32nd piece of V elements, so a row's sums have one order. x is f32: the residual stream.
extern __shared__ float columns[];

template <int V>
__device__ __forceinline__ Vec<V> weight_at(const float* weight, u32 i) {
    if (weight) return load<V>(weight + i);
    Vec<V> ones;
#pragma unroll
    for (int e = 0; e < V; e++) ones[e] = 1.f;
    return ones;
}

template <int V>
__device__ __forceinline__ void forward(const float* x, const float* weight, act* y, float* inv_rms, u32 row, u32 lane, u32 m, float eps) {
    float squares = 0.f;
    for (u32 i = lane * V; i < m; i += 32 * V) {
        const Vec<V> a = load<V>(x + i);
#pragma unroll
        for (int e = 0; e < V; e++) squares = fmaf(a[e], a[e], squares);
    }
    const float inv = 1.f / sqrtf(warp_sum(squares) / (float)m + eps);
    if (lane == 0) inv_rms[row] = inv;
    for (u32 i = lane * V; i < m; i += 32 * V) {
        Vec<V> a = load<V>(x + i);
        const Vec<V> w = weight_at<V>(weight, i);
#pragma unroll
        for (int e = 0; e < V; e++) a[e] *= inv * w[e];
        store<V>(y + i, a);
    }
}

KERNEL rms_norm_fwd(const float* __restrict__ x, const float* __restrict__ weight, act* __restrict__ y, float* __restrict__ inv_rms,
                    u32 n_rows, u32 m, float eps) {
    const u32 row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (row >= n_rows) return;
    const u64 at = (u64)row * m;
    if (m % 4 == 0) forward<4>(x + at, weight, y + at, inv_rms, row, lane, m, eps);
    else forward<1>(x + at, weight, y + at, inv_rms, row, lane, m, eps);
}

// dx = before + inv (g - x inv^2 mean(g x)) with g = dy weight; `sums` += dy x inv.
template <int V>
__device__ __forceinline__ void backward(const act* dy, const float* x, const float* weight, float inv, const float* before, float* dx, u16* narrow,
                                         float* sums, u32 lane, u32 m) {
    float along = 0.f;
    for (u32 i = lane * V; i < m; i += 32 * V) {
        const Vec<V> d = load<V>(dy + i), a = load<V>(x + i), w = weight_at<V>(weight, i);
#pragma unroll
        for (int e = 0; e < V; e++) along = fmaf(d[e] * w[e], a[e], along);
    }
    along = warp_sum(along) / (float)m * inv * inv;
    for (u32 i = lane * V; i < m; i += 32 * V) {
        const Vec<V> d = load<V>(dy + i), a = load<V>(x + i), w = weight_at<V>(weight, i);
        Vec<V> g;
#pragma unroll
        for (int e = 0; e < V; e++) g[e] = inv * fmaf(a[e], -along, d[e] * w[e]);
        if (before) {
            const Vec<V> b = load<V>(before + i);
#pragma unroll
            for (int e = 0; e < V; e++) g[e] += b[e];
        }
        store<V>(dx + i, g);
        if (narrow) store<V>(narrow + i, g);
        if (sums) {
            Vec<V> s = load<V>(sums + i);
#pragma unroll
            for (int e = 0; e < V; e++) s[e] = fmaf(a[e] * inv, d[e], s[e]);
            store<V>(sums + i, s);
        }
    }
}

// A warp takes every so-manieth row. `before` (which may be dx) is added, `narrow` is dx in bf16, `partial [blocks, m]` a share of the
// weight's gradient; each may be null. Shared memory: with `partial`, m floats a warp.
KERNEL rms_norm_bwd(const act* __restrict__ dy, const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ inv_rms,
                    const float* before, float* dx, u16* __restrict__ narrow, float* __restrict__ partial, u32 n_rows, u32 m) {
    const u32 warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5, lane = threadIdx.x & 31;
    float* sums = partial ? columns + warp * m : nullptr;
    if (partial)
        for (u32 i = lane; i < m; i += 32) sums[i] = 0.f;
    __syncwarp();
    for (u32 row = blockIdx.x * n_warps + warp; row < n_rows; row += gridDim.x * n_warps) {
        const u64 at = (u64)row * m;
        const float* b = before ? before + at : nullptr;
        u16* n = narrow ? narrow + at : nullptr;
        if (m % 4 == 0) backward<4>(dy + at, x + at, weight, inv_rms[row], b, dx + at, n, sums, lane, m);
        else backward<1>(dy + at, x + at, weight, inv_rms[row], b, dx + at, n, sums, lane, m);
    }
    if (!partial) return;
    __syncthreads();
    for (u32 i = threadIdx.x; i < m; i += blockDim.x) {
        float sum = 0.f;
        for (u32 w = 0; w < n_warps; w++) sum += columns[w * m + i];
        partial[(u64)blockIdx.x * m + i] = sum;
    }
}
