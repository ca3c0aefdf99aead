// Rows of 3 n numbers to three matrices with rows of n.
KERNEL unpack(const act* __restrict__ x, act* __restrict__ a, act* __restrict__ b, act* __restrict__ c, u64 n_rows, u32 n) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n_rows * n; i += (u64)gridDim.x * blockDim.x) {
        const act* from = x + i / n * 3 * n + i % n;
        a[i] = from[0], b[i] = from[n], c[i] = from[2 * n];
    }
}
