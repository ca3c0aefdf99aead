// y = layer norm of x + added + residual. One warp per row; lanes take every 32nd piece of 16 bytes, so a row's sums have one order.

// Elements of 16 bytes.
constexpr int V = 16 / sizeof(act);
// Columns of a row that stays in registers, and its pieces in a lane: all of a row is on its way before the first sum.
constexpr int LONGEST = 1024, PIECES = LONGEST / (32 * V);

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

__device__ __forceinline__ void in_registers(const act* __restrict__ x, const float* __restrict__ added, const act* __restrict__ residual, const float* __restrict__ weight,
                                             const float* __restrict__ bias, act* __restrict__ y, u32 lane, u32 m, float eps) {
    uint4 xs[PIECES], residuals[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const u32 i = (p * 32 + lane) * V;
        if (i < m) xs[p] = *(const uint4*)(x + i), residuals[p] = *(const uint4*)(residual + i);
    }
    float s[PIECES][V], sum = 0.f, squares = 0.f;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const u32 i = (p * 32 + lane) * V;
        if (i >= m) continue;
        float a[V], r[V];
        unpack(xs[p], s[p]);
        unpack(residuals[p], r);
        load_floats(added + i, a);
#pragma unroll
        for (int e = 0; e < V; e++) s[p][e] += a[e] + r[e], sum += s[p][e];
    }
    const float mean = warp_sum(sum) / (float)m;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        if ((p * 32 + lane) * V >= m) continue;
#pragma unroll
        for (int e = 0; e < V; e++) squares = fmaf(s[p][e] - mean, s[p][e] - mean, squares);
    }
    const float inv = 1.f / sqrtf(warp_sum(squares) / (float)m + eps);
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const u32 i = (p * 32 + lane) * V;
        if (i >= m) continue;
        float w[V], b[V];
        load_floats(weight + i, w);
        load_floats(bias + i, b);
#pragma unroll
        for (int e = 0; e < V; e++) s[p][e] = fmaf((s[p][e] - mean) * inv, w[e], b[e]);
        uint4 out;
        if constexpr (V == 4) out = make_uint4(__float_as_uint(s[p][0]), __float_as_uint(s[p][1]), __float_as_uint(s[p][2]), __float_as_uint(s[p][3]));
        else out = make_uint4(pack_bf16(s[p][0], s[p][1]), pack_bf16(s[p][2], s[p][3]), pack_bf16(s[p][4], s[p][5]), pack_bf16(s[p][6], s[p][7]));
        *(uint4*)(y + i) = out;
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

// Registers for two blocks a multiprocessor with rows of f32, four with rows of bf16: as many bytes under way in either.
KERNEL __launch_bounds__(256, V / 2) layer_norm_residual(const act* __restrict__ x, const float* __restrict__ added, const act* __restrict__ residual,
                           const float* __restrict__ weight, const float* __restrict__ bias, act* __restrict__ y, u32 n_rows, u32 m, float eps) {
    const u32 row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (row >= n_rows) return;
    const u64 at = (u64)row * m;
    if (m % V == 0 && m <= LONGEST) in_registers(x + at, added, residual + at, weight, bias, y + at, lane, m, eps);
    else reading_again(x + at, added, residual + at, weight, bias, y + at, lane, m, eps);
}
