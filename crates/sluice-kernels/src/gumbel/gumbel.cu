// The hash of `mod.rs`, number for number.
__device__ __forceinline__ u64 mix(u64 a, u64 b) {
    u64 z = a * 0x9E3779B97F4A7C15ull ^ (b * 0xC2B2AE3D27D4EB4Full + 0x165667B19E3779F9ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

KERNEL add_gumbel(const float* __restrict__ scores, float* __restrict__ noisy, u64 n, u64 seed, u64 stream, float scale) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        const float u = (float)(mix(seed ^ i, stream) >> 40) / 16777216.f;
        noisy[i] = scores[i] - scale * logf(-logf(fminf(fmaxf(u, 1e-6f), 1.f - 1e-6f)));
    }
}
