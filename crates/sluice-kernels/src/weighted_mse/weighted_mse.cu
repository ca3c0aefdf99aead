// A warp per row. A row of weight 0 is not looked at: it may hold anything.
KERNEL weighted_mse_fwd(const float* __restrict__ a, const float* __restrict__ b, const float* __restrict__ weights,
                        float* __restrict__ terms, float* __restrict__ factors, u32 n_rows, u32 m, float tiny) {
    const u32 row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (row >= n_rows) return;
    const float weight = weights[row];
    float error = 0.f, norm = 0.f;
    if (weight != 0.f) {
        a += (u64)row * m;
        b += (u64)row * m;
        for (u32 i = lane; i < m; i += 32) {
            const float off = a[i] - b[i];
            error = fmaf(off, off, error);
            norm = fmaf(b[i], b[i], norm);
        }
    }
    error = warp_sum(error);
    norm = fmaxf(warp_sum(norm), tiny);
    if (lane > 0) return;
    terms[row] = weight == 0.f ? 0.f : weight * (error / norm);
    factors[row] = weight == 0.f ? 0.f : 2.f * weight / norm;
}

KERNEL weighted_mse_bwd(const float* __restrict__ dy, const float* __restrict__ a, const float* __restrict__ b,
                        const float* __restrict__ factors, float* __restrict__ da, u64 n, u32 m) {
    const float upstream = dy[0];
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        const float factor = factors[i / m];
        da[i] = factor == 0.f ? 0.f : upstream * factor * (a[i] - b[i]);
    }
}
