// y = layer norm of x + added + residual. Rows of up to LONGEST columns have a block of threads, which stays for several of them: a thread has the same 16 bytes of
// columns in all, so that it reads the vectors once, and fetches them in the next row before it sums up this one. Longer and odd rows have a warp.
// A row's sums have one order.

// Elements of 16 bytes.
constexpr int V = 16 / sizeof(act);
constexpr u32 LONGEST = 1024;

// The numbers of 16 bytes.
__device__ __forceinline__ void unpack(const uint4& from, float* to) {
    const u32 words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (V == 4) to[i] = __uint_as_float(words[i]);
        else to[2 * i] = __uint_as_float(words[i] << 16), to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ void load_floats(const float* from, float* to) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
        const float4 x = *(const float4*)(from + i);
        to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
    }
}

// Sum over the block, the same for every thread. `parts` may be written again when all threads have met once more.
__device__ __forceinline__ float sum_over_warps(float x, float* parts) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.f;
    for (u32 i = 0; i < blockDim.x / 32; i++) sum += parts[i];
    return sum;
}

__device__ __forceinline__ void by_block(const act* __restrict__ x, const float* __restrict__ added, const act* __restrict__ residual, const float* __restrict__ weight,
                                         const float* __restrict__ bias, act* __restrict__ y, u32 n_rows, u32 m, float eps) {
    __shared__ float sums[LONGEST / 4 / 32], squares[LONGEST / 4 / 32];
    const u32 i = threadIdx.x * V;
    const bool here = i < m;
    float a[V], w[V], b[V];
    uint4 next_x, next_residual;
    const auto fetch = [&](u32 row) {
        if (here && row < n_rows) next_x = *(const uint4*)(x + (u64)row * m + i), next_residual = *(const uint4*)(residual + (u64)row * m + i);
    };
    fetch(blockIdx.x);
    if (here) load_floats(added + i, a), load_floats(weight + i, w), load_floats(bias + i, b);
    for (u32 row = blockIdx.x; row < n_rows; row += gridDim.x) {
        float s[V] = {}, r[V], sum = 0.f, square = 0.f;
        if (here) {
            unpack(next_x, s);
            unpack(next_residual, r);
#pragma unroll
            for (int e = 0; e < V; e++) s[e] += a[e] + r[e], sum += s[e];
        }
        fetch(row + gridDim.x);
        const float mean = sum_over_warps(sum, sums) / (float)m;
        if (here) {
#pragma unroll
            for (int e = 0; e < V; e++) square = fmaf(s[e] - mean, s[e] - mean, square);
        }
        const float inv = 1.f / sqrtf(sum_over_warps(square, squares) / (float)m + eps);
        if (!here) continue;
#pragma unroll
        for (int e = 0; e < V; e++) s[e] = fmaf((s[e] - mean) * inv, w[e], b[e]);
        uint4 out;
        if constexpr (V == 4) out = make_uint4(__float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]), __float_as_uint(s[3]));
        else out = make_uint4(pack_bf16(s[0], s[1]), pack_bf16(s[2], s[3]), pack_bf16(s[4], s[5]), pack_bf16(s[6], s[7]));
        *(uint4*)(y + (u64)row * m + i) = out;
    }
}

__device__ __forceinline__ void reading_again(const act* x, const float* added, const act* residual, const float* weight, const float* bias, act* y,
                                              u32 lane, u32 m, float eps) {
    const auto at = [&](u32 i) { return load<1>(x + i)[0] + added[i] + load<1>(residual + i)[0]; };
    float sum = 0.f, squares = 0.f;
    for (u32 i = lane; i < m; i += 32) sum += at(i);
    const float mean = warp_sum(sum) / (float)m;
    for (u32 i = lane; i < m; i += 32) squares = fmaf(at(i) - mean, at(i) - mean, squares);
    const float inv = 1.f / sqrtf(warp_sum(squares) / (float)m + eps);
    for (u32 i = lane; i < m; i += 32) store<1>(y + i, Vec<1>{{fmaf((at(i) - mean) * inv, weight[i], bias[i])}});
}

// Any grid covers any number of rows. Where `m` is a multiple of V and at most LONGEST, a block has `m / V` threads at least.
KERNEL __launch_bounds__(256, 4) layer_norm_residual(const act* __restrict__ x, const float* __restrict__ added, const act* __restrict__ residual,
                                                     const float* __restrict__ weight, const float* __restrict__ bias, act* __restrict__ y, u32 n_rows, u32 m, float eps) {
    if (m % V == 0 && m <= LONGEST) {
        by_block(x, added, residual, weight, bias, y, n_rows, m, eps);
        return;
    }
    const u32 warps = blockDim.x / 32, lane = threadIdx.x % 32;
    for (u32 row = blockIdx.x * warps + threadIdx.x / 32; row < n_rows; row += gridDim.x * warps) {
        const u64 at = (u64)row * m;
        reading_again(x + at, added, residual + at, weight, bias, y + at, lane, m, eps);
    }
}
