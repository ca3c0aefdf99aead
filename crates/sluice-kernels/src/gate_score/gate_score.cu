// x is an activation. One warp per row; lanes take every 32nd element, so a row's score has the same bits alone and among others.
#define ROW(n_rows) \
    const u32 row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31; \
    if (row >= n_rows) return

__device__ __forceinline__ float at(const act* x, u32 i) { return load<1>(x + i)[0]; }

__device__ __forceinline__ float inverse_rms(const act* x, u32 m, u32 lane, float eps) {
    float squares = 0.f;
    for (u32 i = lane; i < m; i += 32) squares = fmaf(at(x, i), at(x, i), squares);
    return 1.f / sqrtf(warp_sum(squares) / (float)m + eps);
}

KERNEL gate_score_fwd(const act* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                      const float* __restrict__ recency, const u32* __restrict__ positions, float* __restrict__ scores,
                      u32 n_rows, u32 t, u32 m, u32 gs, float eps, float unit) {
    ROW(n_rows);
    x += (u64)row * m;
    const float inv = inverse_rms(x, m, lane, eps);
    const float age = (float)positions[row % t] / unit;
    for (u32 g = 0; g < gs; g++) {
        float dot = 0.f;
        for (u32 i = lane; i < m; i += 32) dot = fmaf(at(x, i), weight[g * m + i], dot);
        dot = warp_sum(dot);
        if (lane == 0) scores[(u64)row * gs + g] = inv * dot + bias[g] + recency[g] * age;
    }
}

// What the sums over rows need of each row, and dx = sum_g d_g inv (a_g - x inv^2 mean(a_g x)) if it is wanted.
KERNEL gate_score_bwd(const float* __restrict__ dscores, const act* __restrict__ x, const float* __restrict__ weight,
                      const u32* __restrict__ positions, float* __restrict__ inv_rms, float* __restrict__ ages, float* __restrict__ dx,
                      u32 n_rows, u32 t, u32 m, u32 gs, float eps, float unit) {
    ROW(n_rows);
    x += (u64)row * m;
    const float inv = inverse_rms(x, m, lane, eps);
    if (lane == 0) {
        inv_rms[row] = inv;
        ages[row] = (float)positions[row % t] / unit;
    }
    if (!dx) return;
    dx += (u64)row * m;
    for (u32 i = lane; i < m; i += 32) dx[i] = 0.f;
    for (u32 g = 0; g < gs; g++) {
        const float d = dscores[(u64)row * gs + g];
        if (d == 0.f) continue;
        const float* a = weight + g * m;
        float dot = 0.f;
        for (u32 i = lane; i < m; i += 32) dot = fmaf(at(x, i), a[i], dot);
        const float along = inv * inv * warp_sum(dot) / (float)m;
        for (u32 i = lane; i < m; i += 32) dx[i] = fmaf(d * inv, fmaf(at(x, i), -along, a[i]), dx[i]);
    }
}

KERNEL add_recency(const float* __restrict__ scores, const float* __restrict__ slopes, float* __restrict__ later, u64 n, u32 t, u32 g,
                   float unit) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x)
        later[i] = scores[i] + slopes[i % g] * (float)(u32)(i / g % t) / unit;
}
