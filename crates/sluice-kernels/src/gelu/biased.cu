// x = gelu(x + bias), in place. A block has 8 rows and a piece of columns, so that a thread reads its biases once.

constexpr int ROWS = 8;
// Elements of 16 bytes.
constexpr int V = 16 / sizeof(act);

// What a result in bf16 keeps is eight bits: there the normal distribution comes from Abramowitz and Stegun 26.2.17, off by 7.5e-8 at most, at half
// the instructions of erff. Over half a billion elements a forward pass, that is what this kernel takes.
__device__ __forceinline__ float gelu(float x) {
    if constexpr (sizeof(act) == 4) {
        return x * (0.5f * (1.f + erff(x * 0.70710678118654752f)));
    } else {
        const float t = __fdividef(1.f, fmaf(0.2316419f, fabsf(x), 1.f));
        const float density = 0.3989422804014327f * exp2f(-0.72134752044448170f * x * x);
        float tail = fmaf(t, 1.330274429f, -1.821255978f);
        tail = fmaf(t, tail, 1.781477937f);
        tail = fmaf(t, tail, -0.356563782f);
        tail = fmaf(t, tail, 0.319381530f) * t * density;
        return x * (x > 0.f ? 1.f - tail : tail);
    }
}

// The numbers of one word of 16 bytes: one f32, or two bf16.
__device__ __forceinline__ u32 gelu_of_word(u32 word, const float* bias) {
    if constexpr (sizeof(act) == 4) {
        return __float_as_uint(gelu(__uint_as_float(word) + bias[0]));
    } else {
        return pack_bf16(gelu(__uint_as_float(word << 16) + bias[0]), gelu(__uint_as_float(word & 0xffff0000u) + bias[1]));
    }
}

KERNEL gelu_biased(act* x, const float* __restrict__ bias, u32 n_rows, u32 n) {
    const u32 column = (blockIdx.y * blockDim.x + threadIdx.x) * V, first = blockIdx.x * ROWS, end = min(first + ROWS, n_rows);
    if (column >= n) return;
    if (n % V == 0) {
        float b[V];
#pragma unroll
        for (int e = 0; e < V; e++) b[e] = bias[column + e];
#pragma unroll 4
        for (u32 row = first; row < end; row++) {
            uint4* at = (uint4*)(x + (u64)row * n + column);
            uint4 y = *at;
            y.x = gelu_of_word(y.x, b);
            y.y = gelu_of_word(y.y, b + V / 4);
            y.z = gelu_of_word(y.z, b + V / 2);
            y.w = gelu_of_word(y.w, b + 3 * V / 4);
            *at = y;
        }
    } else {
        for (u32 row = first; row < end; row++) {
            for (u32 c = column; c < min(column + V, n); c++) {
                act* at = x + (u64)row * n + c;
                store<1>(at, Vec<1>{{gelu(load<1>(at)[0] + bias[c])}});
            }
        }
    }
}
