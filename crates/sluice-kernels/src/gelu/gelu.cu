#define EACH(i, n) for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x)

__device__ __forceinline__ float normal_cdf(float x) { return 0.5f * (1.f + erff(x * 0.70710678118654752f)); }

KERNEL gelu_fwd(const float* __restrict__ x, float* __restrict__ y, u64 n) {
    EACH(i, n) y[i] = x[i] * normal_cdf(x[i]);
}

// The density of the standard normal at 0 is 1 / sqrt(2 pi).
KERNEL gelu_bwd(const float* __restrict__ dy, const float* __restrict__ x, float* __restrict__ dx, u64 n) {
    EACH(i, n) dx[i] = dy[i] * fmaf(x[i], 0.3989422804014327f * expf(-0.5f * x[i] * x[i]), normal_cdf(x[i]));
}
