// Block g has head g; scores are [T, G]. Sums are added in f64, in one order.

// A number in an order-preserving form, as `f32::total_cmp` orders them.
__device__ __forceinline__ u32 rank_of(float x) {
    const u32 bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float number_of(u32 rank) { return __uint_as_float(rank >> 31 ? rank & 0x7fffffffu : ~rank); }

// The k-th largest of n numbers in shared memory, k from 1: eight bits at a time, by counting. Every thread gets it.
__device__ u32 nth_largest(const u32* values, u32 n, u32 k) {
    __shared__ u32 bins[256], digit, rest;
    u32 prefix = 0, known = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (u32 i = threadIdx.x; i < 256; i += blockDim.x) bins[i] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < n; i += blockDim.x)
            if ((values[i] & known) == prefix) atomicAdd(&bins[values[i] >> shift & 255u], 1u);  // whole numbers: any order will do
        __syncthreads();
        if (threadIdx.x < 32) {
            // Lane 0 has the eight largest digits.
            u32 sum = 0;
            for (u32 e = 0; e < 8; e++) sum += bins[255 - (threadIdx.x * 8 + e)];
            u32 before = sum;
#pragma unroll
            for (int d = 1; d < 32; d <<= 1) {
                const u32 other = __shfl_up_sync(0xffffffffu, before, d);
                if (threadIdx.x >= d) before += other;
            }
            before -= sum;
            for (u32 e = 0; e < 8; e++) {
                const u32 at = 255 - (threadIdx.x * 8 + e);
                if (before < k && before + bins[at] >= k) digit = at, rest = k - before;
                before += bins[at];
            }
        }
        __syncthreads();
        prefix |= digit << shift;
        known |= 255u << shift;
        k = rest;
        __syncthreads();  // everyone has read what the next turn overwrites
    }
    return prefix;
}

// losses [G]; grad [T, G]. `n` may be 0: no ranking then.
KERNEL __launch_bounds__(1024) gate_loss(const float* __restrict__ scores, const float* __restrict__ slopes, const u32* __restrict__ positions,
                 const float* __restrict__ labels, float* grad, float* __restrict__ losses, u32 t, u32 n_slopes, u32 n, u32 n_kept,
                 float rank, float spread, float smooth, float unit) {
    extern __shared__ u32 values[];
    const u32 head = blockIdx.x, g = gridDim.x;
    const float slope = slopes[min(head, n_slopes - 1)];
    auto content = [&](u32 j) { return scores[(u64)j * g + head] - slope * (float)j / unit; };
    double sum = 0.0;
    for (u32 j = threadIdx.x; j < t; j += blockDim.x) sum += (double)content(j);
    const float mean = (float)(block_sum(sum) / (double)t);
    const float scale = 1.f / (float)((u64)t * g);
    double loss = 0.0;
    for (u32 j = threadIdx.x; j < t; j += blockDim.x) {
        const float here = content(j), centred = here - mean;
        const float to_next = j + 1 < t ? here - content(j + 1) : 0.f, from_last = j > 0 ? content(j - 1) - here : 0.f;
        loss += (double)(spread * scale * centred * centred) + (double)(smooth * scale * to_next * to_next);
        grad[(u64)j * g + head] = 2.f * scale * (spread * centred + smooth * (to_next - from_last));
    }
    if (n > 0) {
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) values[i] = rank_of(labels[(u64)i * g + head]);
        __syncthreads();
        const float label_threshold = number_of(nth_largest(values, n, n_kept));
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) values[i] = rank_of(content(positions[i]));
        __syncthreads();  // and what this block has written of `grad` is there for all its threads
        const float tau = number_of(nth_largest(values, n, n_kept));
        const float per_key = rank / (float)((u64)n * g);
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
            const float z = number_of(values[i]) - tau;
            const float target = labels[(u64)i * g + head] >= label_threshold ? 1.f : 0.f;
            loss += (double)(per_key * (fmaxf(z, 0.f) + log1pf(expf(-fabsf(z))) - target * z));
            grad[(u64)positions[i] * g + head] += per_key * (1.f / (1.f + expf(-z)) - target);  // each position once
        }
    }
    loss = block_sum(loss);
    if (threadIdx.x == 0) losses[head] = (float)loss;
}
