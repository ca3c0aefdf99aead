// Block (c, k, g) sums 32 columns of chunk k for output row g: 8 warps take turns on the rows, then add up in order.
KERNEL partial_sums(const act* __restrict__ x, const act* __restrict__ y, const float* __restrict__ row_scale,
                    const float* __restrict__ coefficients, float* __restrict__ partial, u32 n_rows, u32 per_chunk, u32 m) {
    __shared__ float sums[8][32];
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 c = blockIdx.x * 32 + lane, g = blockIdx.z, n_out = gridDim.z;
    const u32 first = blockIdx.y * per_chunk, end = min(first + per_chunk, n_rows);
    float sum = 0.f;
    if (c < m) {
        for (u32 r = first + warp; r < end; r += 8) {
            const u64 at = (u64)r * m + c;
            float v = load<1>(x + at)[0];
            if (y) v *= load<1>(y + at)[0];
            if (row_scale) v *= row_scale[r];
            if (coefficients) v *= coefficients[(u64)r * n_out + g];
            sum += v;
        }
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && c < m) {
#pragma unroll
        for (int w = 1; w < 8; w++) sum += sums[w][lane];
        partial[((u64)blockIdx.y * n_out + g) * m + c] = sum;
    }
}

// Block c adds up 32 of n columns: 8 warps take turns on the chunks, then add up in order.
KERNEL sum_partials(const float* __restrict__ partial, float* __restrict__ out, u32 n_chunks, u64 n) {
    __shared__ float sums[8][32];
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u64 i = blockIdx.x * 32ull + lane;
    float sum = 0.f;
    if (i < n) {
#pragma unroll 4
        for (u32 k = warp; k < n_chunks; k += 8) sum += partial[k * n + i];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && i < n) {
#pragma unroll
        for (int w = 1; w < 8; w++) sum += sums[w][lane];
        out[i] = sum;
    }
}

// One block.
KERNEL sum_to_scalar(const float* __restrict__ x, float* __restrict__ out, u64 n) {
    double sum = 0.0;
    for (u64 i = threadIdx.x; i < n; i += blockDim.x) sum += (double)x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[0] = (float)sum;
}
