// A block per column of a sequence; its sum is in f64, always in the same order.
KERNEL centre(const float* __restrict__ x, const u32* __restrict__ lens, float* __restrict__ y, u32 T, u32 G) {
    const u64 first = (u64)blockIdx.y * T * G + blockIdx.x;
    const u32 len = lens[blockIdx.y];
    double sum = 0.0;
    for (u32 t = threadIdx.x; t < len; t += blockDim.x) sum += x[first + (u64)t * G];
    const float mean = (float)(block_sum(sum) / len);
    for (u32 t = threadIdx.x; t < T; t += blockDim.x) y[first + (u64)t * G] = t < len ? x[first + (u64)t * G] - mean : 0.f;
}
