// Block d has the rows from ends[d] to ends[d + 1]. Figures are [rows, 3]: loss, token, probability. `local` may be null.
KERNEL token_weights(const float* __restrict__ figures, const float* __restrict__ local, const float* __restrict__ draws, const u32* __restrict__ ends,
                     float sure, float share, float far_gain, float far_weight, float* __restrict__ weights) {
    const u32 begin = ends[blockIdx.x], end = ends[blockIdx.x + 1];
    float sum = 0.f;  // of 0, 1 and far_weight: whole numbers are exact in any order
    for (u32 i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const float* f = figures + (u64)i * 3;
        const float gain = local ? local[(u64)i * 3] - f[0] : 0.f;
        const bool counts = f[2] > sure || draws[i] < share;
        const float weight = !counts ? 0.f : gain > far_gain ? far_weight : 1.f;
        weights[i] = weight;
        sum += weight;
    }
    sum = block_sum(sum);
    for (u32 i = begin + threadIdx.x; i < end; i += blockDim.x)
        if (weights[i] > 0.f) weights[i] /= sum;
}
