// rows [n, M + 1 + G]: the normalised input, 1, the labels. A warp per row.
KERNEL gather_rows(const float* __restrict__ x, const u32* __restrict__ positions, const float* __restrict__ y, float* __restrict__ rows,
                   u32 n, u32 m, u32 g, float eps) {
    const u32 row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (row >= n) return;
    x += (u64)positions[row] * m;
    rows += (u64)row * (m + 1 + g);
    float squares = 0.f;
    for (u32 i = lane; i < m; i += 32) squares = fmaf(x[i], x[i], squares);
    const float inv = 1.f / sqrtf(warp_sum(squares) / (float)m + eps);
    for (u32 i = lane; i < m; i += 32) rows[i] = x[i] * inv;
    if (lane == 0) rows[m] = 1.f;
    for (u32 i = lane; i < g; i += 32) rows[m + 1 + i] = y[(u64)row * g + i];
}

// sums += rows^T rows. A block has 32 x 32 of them, a thread 2 x 2; nobody else writes them.
KERNEL add_gram(const float* __restrict__ rows, double* __restrict__ sums, u32 n, u32 width) {
    constexpr u32 TILE = 32;
    __shared__ float a[TILE][TILE + 1], b[TILE][TILE + 1];
    const u32 x = threadIdx.x % 16, y = threadIdx.x / 16, row = blockIdx.y * TILE, col = blockIdx.x * TILE;
    double acc[2][2] = {};
    for (u32 first = 0; first < n; first += TILE) {
        __syncthreads();  // the last tile has been read
        for (u32 e = threadIdx.x; e < TILE * TILE; e += blockDim.x) {
            const u32 i = e / TILE, c = e % TILE;
            const float* from = rows + (u64)(first + i) * width;
            a[i][c] = first + i < n && row + c < width ? from[row + c] : 0.f;
            b[i][c] = first + i < n && col + c < width ? from[col + c] : 0.f;
        }
        __syncthreads();
#pragma unroll 8
        for (u32 i = 0; i < TILE; i++) {
            const double a0 = a[i][y], a1 = a[i][y + 16], b0 = b[i][x], b1 = b[i][x + 16];
            acc[0][0] = fma(a0, b0, acc[0][0]);
            acc[0][1] = fma(a0, b1, acc[0][1]);
            acc[1][0] = fma(a1, b0, acc[1][0]);
            acc[1][1] = fma(a1, b1, acc[1][1]);
        }
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++)
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            const u32 r = row + y + 16 * i, c = col + x + 16 * j;
            if (r < width && c < width) sums[(u64)r * width + c] += acc[i][j];
        }
}
