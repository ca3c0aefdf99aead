// partial [B, G, n_blocks] (kept, all). Grid [n_blocks, G, B].
KERNEL block_sums(const float* __restrict__ mass, const int* __restrict__ indices, double2* __restrict__ partial, u32 s, u32 n_routed,
                  u32 window, u32 every) {
    const u32 block = blockIdx.x, g = blockIdx.y, b = blockIdx.z;
    const u64 row = ((u64)b * gridDim.x + block) * gridDim.y + g, first = (u64)block * every + 1;
    const u32 first_local = (u32)min(first > window ? first - window : 0ull, (u64)s);
    mass += row * s;
    indices += row * n_routed;
    double kept = 0.0, all = 0.0;
    for (u32 j = threadIdx.x; j < first_local; j += blockDim.x) all += (double)mass[j];
    for (u32 i = threadIdx.x; i < n_routed; i += blockDim.x)
        if (indices[i] >= 0) kept += (double)mass[indices[i]];
    kept = block_sum(kept);
    all = block_sum(all);
    if (threadIdx.x == 0) partial[((u64)b * gridDim.y + g) * gridDim.x + block] = make_double2(kept, all);
}

// share [B G]: a block each.
KERNEL shares(const double2* __restrict__ partial, float* __restrict__ share, u32 n_blocks, float nothing) {
    partial += (u64)blockIdx.x * n_blocks;
    double kept = 0.0, all = 0.0;
    for (u32 i = threadIdx.x; i < n_blocks; i += blockDim.x) kept += partial[i].x, all += partial[i].y;
    kept = block_sum(kept);
    all = block_sum(all);
    if (threadIdx.x == 0) share[blockIdx.x] = (float)(kept / (all + (double)nothing));
}
