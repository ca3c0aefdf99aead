// A thread strides over the whole, so any grid covers any length.
#define EACH(i, n) for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x)

KERNEL narrow(const float* __restrict__ x, u16* __restrict__ y, u64 n) {
    EACH(i, n) y[i] = to_bf16(x[i]);
}

KERNEL widen(const u16* __restrict__ x, float* __restrict__ y, u64 n) {
    EACH(i, n) y[i] = from_bf16(x[i]);
}

KERNEL fill(float* __restrict__ x, float value, u64 n) {
    EACH(i, n) x[i] = value;
}
