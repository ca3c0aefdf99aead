#define EACH(i, n) for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x)

KERNEL add(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ y, u64 n) {
    EACH(i, n) y[i] = a[i] + b[i];
}

KERNEL add_assign(float* __restrict__ sum, const float* __restrict__ x, u64 n) {
    EACH(i, n) sum[i] += x[i];
}
