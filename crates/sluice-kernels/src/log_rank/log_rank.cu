// A number in an order-preserving form, as `f32::total_cmp` orders them.
__device__ __forceinline__ u32 order_of(float x) {
    const u32 bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// y, ranked [n, G]. Block (i, g) has 256 numbers of head g, and walks over all of it.
KERNEL minus_log_rank(const float* __restrict__ y, float* __restrict__ ranked, u32 n) {
    __shared__ u32 others[256];
    const u32 i = blockIdx.x * 256 + threadIdx.x, head = blockIdx.y, g = gridDim.y;
    const u32 own = i < n ? order_of(y[(u64)i * g + head]) : 0;
    u32 before = 0;
    for (u32 first = 0; first < n; first += 256) {
        __syncthreads();  // the last ones have been read
        if (first + threadIdx.x < n) others[threadIdx.x] = order_of(y[(u64)(first + threadIdx.x) * g + head]);
        __syncthreads();
        for (u32 e = 0; e < min(256u, n - first); e++) before += others[e] > own || (others[e] == own && first + e < i);
    }
    if (i < n) ranked[(u64)i * g + head] = logf((float)n / (float)(before + 1));
}
