KERNEL embedding_fwd(const u32* __restrict__ tokens, const void* __restrict__ table, float* __restrict__ y, u64 n, u32 m, u32 narrow) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        const u64 at = (u64)tokens[i / m] * m + i % m;
        y[i] = narrow ? from_bf16(((const u16*)table)[at]) : ((const float*)table)[at];
    }
}

// A block per row; `ids` are n of each table, one table's after the other's.
KERNEL embedding_sum(const u32* __restrict__ ids, const float* __restrict__ words, const float* __restrict__ positions, const float* __restrict__ types,
                     float* __restrict__ y, u32 n, u32 m) {
    const float* word = words + (u64)ids[blockIdx.x] * m;
    const float* position = positions + (u64)ids[n + blockIdx.x] * m;
    const float* type = types + (u64)ids[2 * n + blockIdx.x] * m;
    for (u32 i = threadIdx.x; i < m; i += blockDim.x) y[(u64)blockIdx.x * m + i] = word[i] + position[i] + type[i];
}

// Block (u, c): row `unique[u]` of the table gets the rows `order[first[u]..first[u + 1]]` of dy added in the order of the text.
KERNEL embedding_bwd(const float* __restrict__ dy, const u32* __restrict__ unique, const u32* __restrict__ first,
                     const u32* __restrict__ order, float* __restrict__ dtable, u32 m) {
    const u32 c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= m) return;
    const u32 end = first[blockIdx.x + 1];
    float* to = dtable + (u64)unique[blockIdx.x] * m + c;
    float sum = *to;
    for (u32 k = first[blockIdx.x]; k < end; k++) sum += dy[(u64)order[k] * m + c];
    *to = sum;
}
