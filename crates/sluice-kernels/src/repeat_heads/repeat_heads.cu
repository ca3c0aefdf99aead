#define EACH(i, n) for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x)

KERNEL repeat_heads_fwd(const float* __restrict__ x, float* __restrict__ y, u64 elements, u32 n) {
    EACH(i, elements) y[i] = x[i / n];
}

KERNEL repeat_heads_bwd(const float* __restrict__ dy, float* __restrict__ dx, u64 elements, u32 n) {
    EACH(i, elements) {
        float sum = 0.f;
        for (u32 head = 0; head < n; head++) sum += dy[i * n + head];
        dx[i] = sum;
    }
}
