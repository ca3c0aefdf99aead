// gram [H, D, D] of w_o [M, H D]: block (x, y, h) has 16 x 16 of W_h^T W_h.
KERNEL gram(const float* __restrict__ w_o, float* __restrict__ gram, u32 m, u32 d) {
    constexpr u32 TILE = 16;
    __shared__ float a[TILE][TILE + 1], b[TILE][TILE + 1];
    const u32 x = threadIdx.x % TILE, y = threadIdx.x / TILE, h = blockIdx.z;
    const u32 row = blockIdx.y * TILE, col = blockIdx.x * TILE;
    const u64 stride = (u64)gridDim.z * d;
    float sum = 0.f;
    for (u32 first = 0; first < m; first += TILE) {
        const u32 i = first + y;
        const float* from = w_o + i * stride + (u64)h * d;
        __syncthreads();  // the last tile has been read
        a[y][x] = i < m && row + x < d ? from[row + x] : 0.f;
        b[y][x] = i < m && col + x < d ? from[col + x] : 0.f;
        __syncthreads();
#pragma unroll
        for (u32 k = 0; k < TILE; k++) sum = fmaf(a[k][y], b[k][x], sum);
    }
    if (row + y < d && col + x < d) gram[((u64)h * d + row + y) * d + col + x] = sum;
}

// norms [rows, H] = v^T gram_h v, a warp per value and head. v [rows, G, D].
KERNEL quadratic_forms(const float* __restrict__ v, const float* __restrict__ gram, float* __restrict__ norms, u32 n_rows, u32 n_heads,
                       u32 g, u32 d) {
    const u32 row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31, h = blockIdx.y;
    if (row >= n_rows) return;
    v += ((u64)row * g + h / (n_heads / g)) * d;
    gram += (u64)h * d * d;
    float sum = 0.f;
    for (u32 q = lane; q < d; q += 32) {
        float along = 0.f;
        for (u32 p = 0; p < d; p++) along = fmaf(v[p], gram[(u64)p * d + q], along);
        sum = fmaf(along, v[q], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) norms[(u64)row * n_heads + h] = fmaxf(sum, 0.f);
}

KERNEL query_weight(const float* __restrict__ h, float* __restrict__ weights, u32 n_rows, u32 m) {
    const u32 row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (row >= n_rows) return;
    h += (u64)row * m;
    float squares = 0.f;
    for (u32 i = lane; i < m; i += 32) squares = fmaf(h[i], h[i], squares);
    squares = warp_sum(squares);
    if (lane == 0) weights[row] = 1.f / fmaxf(squares, 1e-12f);
}

KERNEL label(const float* __restrict__ mass, float* __restrict__ labels, u64 n) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x)
        labels[i] = 0.5f * logf(fmaxf(mass[i], 1e-24f));
}
