// y = layer norm of x + added + residual. One warp per row; lanes take every 32nd piece of V elements, so a row's sums have one order.

// Pieces of a lane that stay in registers: rows of up to 1024 columns are read once.
constexpr int PIECES = 8;

__device__ __forceinline__ Vec<4> sum_at(const act* x, const float* added, const act* residual, u32 i) {
    Vec<4> s = load<4>(x + i);
    const Vec<4> a = load<4>(added + i), r = load<4>(residual + i);
#pragma unroll
    for (int e = 0; e < 4; e++) s[e] = s[e] + a[e] + r[e];
    return s;
}

__device__ __forceinline__ void in_registers(const act* x, const float* added, const act* residual, const float* weight, const float* bias, act* y,
                                             u32 lane, u32 m, float eps) {
    Vec<4> s[PIECES];
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const u32 i = p * 128 + lane * 4;
        if (i >= m) continue;
        s[p] = sum_at(x, added, residual, i);
        sum += (s[p][0] + s[p][1]) + (s[p][2] + s[p][3]);
    }
    const float mean = warp_sum(sum) / (float)m;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        if (p * 128 + lane * 4 >= m) continue;
#pragma unroll
        for (int e = 0; e < 4; e++) squares = fmaf(s[p][e] - mean, s[p][e] - mean, squares);
    }
    const float inv = 1.f / sqrtf(warp_sum(squares) / (float)m + eps);
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const u32 i = p * 128 + lane * 4;
        if (i >= m) continue;
        const Vec<4> w = load<4>(weight + i), b = load<4>(bias + i);
#pragma unroll
        for (int e = 0; e < 4; e++) s[p][e] = fmaf((s[p][e] - mean) * inv, w[e], b[e]);
        store<4>(y + i, s[p]);
    }
}

__device__ __forceinline__ void reading_again(const act* x, const float* added, const act* residual, const float* weight, const float* bias, act* y,
                                              u32 lane, u32 m, float eps) {
    const auto at = [&](u32 i) { return load<1>(x + i)[0] + added[i] + load<1>(residual + i)[0]; };
    float sum = 0.f, squares = 0.f;
    for (u32 i = lane; i < m; i += 32) sum += at(i);
    const float mean = warp_sum(sum) / (float)m;
    for (u32 i = lane; i < m; i += 32) squares = fmaf(at(i) - mean, at(i) - mean, squares);
    const float inv = 1.f / sqrtf(warp_sum(squares) / (float)m + eps);
    for (u32 i = lane; i < m; i += 32) store<1>(y + i, Vec<1>{{fmaf((at(i) - mean) * inv, weight[i], bias[i])}});
}

KERNEL layer_norm_residual(const act* __restrict__ x, const float* __restrict__ added, const act* __restrict__ residual,
                           const float* __restrict__ weight, const float* __restrict__ bias, act* __restrict__ y, u32 n_rows, u32 m, float eps) {
    const u32 row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (row >= n_rows) return;
    const u64 at = (u64)row * m;
    if (m % 4 == 0 && m <= 128 * PIECES) in_registers(x + at, added, residual + at, weight, bias, y + at, lane, m, eps);
    else reading_again(x + at, added, residual + at, weight, bias, y + at, lane, m, eps);
}
