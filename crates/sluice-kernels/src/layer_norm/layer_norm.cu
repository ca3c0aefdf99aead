// One warp per row; lanes take every 32nd element, so a row's sums have one order.
#define ROW(n_rows) \
    const u32 row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31; \
    if (row >= n_rows) return

// The mean first, then the squares around it: a large mean costs no digits of the variance.
KERNEL layer_norm_fwd(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, float* __restrict__ y,
                      float* __restrict__ means, float* __restrict__ inv_stds, u32 n_rows, u32 m, float eps) {
    ROW(n_rows);
    const float* from = x + (u64)row * m;
    float* to = y + (u64)row * m;
    float sum = 0.f, squares = 0.f;
    for (u32 i = lane; i < m; i += 32) sum += from[i];
    const float mean = warp_sum(sum) / (float)m;
    for (u32 i = lane; i < m; i += 32) squares = fmaf(from[i] - mean, from[i] - mean, squares);
    const float inv = 1.f / sqrtf(warp_sum(squares) / (float)m + eps);
    if (lane == 0) means[row] = mean, inv_stds[row] = inv;
    for (u32 i = lane; i < m; i += 32) to[i] = fmaf((from[i] - mean) * inv, weight[i], bias[i]);
}

// With n = (x - mean) inv and g = dy weight: dx = inv (g - mean(g) - n mean(g n)). `normalised` is n, for the sums over rows.
KERNEL layer_norm_bwd(const float* __restrict__ dy, const float* __restrict__ x, const float* __restrict__ weight,
                      const float* __restrict__ means, const float* __restrict__ inv_stds, float* __restrict__ dx,
                      float* __restrict__ normalised, u32 n_rows, u32 m) {
    ROW(n_rows);
    const u64 at = (u64)row * m;
    const float mean = means[row], inv = inv_stds[row];
    float g_sum = 0.f, gn_sum = 0.f;
    for (u32 i = lane; i < m; i += 32) {
        const float g = dy[at + i] * weight[i], n = (x[at + i] - mean) * inv;
        normalised[at + i] = n;
        g_sum += g;
        gn_sum = fmaf(g, n, gn_sum);
    }
    const float g_mean = warp_sum(g_sum) / (float)m, gn_mean = warp_sum(gn_sum) / (float)m;
    for (u32 i = lane; i < m; i += 32)
        dx[at + i] = inv * fmaf((x[at + i] - mean) * inv, -gn_mean, fmaf(dy[at + i], weight[i], -g_mean));
}
