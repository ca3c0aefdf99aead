// One warp per row; lanes take every 32nd element, so a row's sums have one order.
#define ROW(n_rows) \
    const u32 row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31; \
    if (row >= n_rows) return

KERNEL rms_norm_fwd(const float* __restrict__ x, const float* __restrict__ weight, float* __restrict__ y,
                    float* __restrict__ inv_rms, u32 n_rows, u32 m, float eps) {
    ROW(n_rows);
    const float* from = x + (u64)row * m;
    float* to = y + (u64)row * m;
    float squares = 0.f;
    for (u32 i = lane; i < m; i += 32) squares = fmaf(from[i], from[i], squares);
    const float inv = 1.f / sqrtf(warp_sum(squares) / (float)m + eps);
    if (lane == 0) inv_rms[row] = inv;
    for (u32 i = lane; i < m; i += 32) to[i] = from[i] * inv * (weight ? weight[i] : 1.f);
}

// dx = inv (g - x inv^2 mean(g x)) with g = dy weight
KERNEL rms_norm_bwd(const float* __restrict__ dy, const float* __restrict__ x, const float* __restrict__ weight,
                    const float* __restrict__ inv_rms, float* __restrict__ dx, u32 n_rows, u32 m) {
    ROW(n_rows);
    const u64 at = (u64)row * m;
    const float inv = inv_rms[row];
    float along = 0.f;
    for (u32 i = lane; i < m; i += 32) along = fmaf(dy[at + i] * (weight ? weight[i] : 1.f), x[at + i], along);
    along = warp_sum(along) / (float)m * inv * inv;
    for (u32 i = lane; i < m; i += 32) dx[at + i] = inv * fmaf(x[at + i], -along, dy[at + i] * (weight ? weight[i] : 1.f));
}
