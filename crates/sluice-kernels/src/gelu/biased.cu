// x = gelu(x + bias), in place. A thread has 16 bytes of columns in ROWS rows, so that it reads its biases once and all its words before the first result.

constexpr int ROWS = 4;
// Elements of 16 bytes.
constexpr int V = 16 / sizeof(act);

// What a result in bf16 keeps is eight bits: there the normal distribution comes from Abramowitz and Stegun 26.2.17, off by 7.5e-8 at most, at a third
// of the instructions of erff. Over 0.8 billion elements a forward pass, issuing them takes as long as moving the numbers.
__device__ __forceinline__ float gelu(float x) {
    if constexpr (sizeof(act) == 4) {
        return x * (0.5f * (1.f + erff(x * 0.70710678118654752f)));
    } else {
        // x = relu(x) - |x| tail(|x|). From 30 on the tail is 0, and an infinite x must not meet it; NaN stays NaN.
        float a, t, density;
        asm("min.NaN.f32 %0, %1, 0f41F00000;" : "=f"(a) : "f"(fabsf(x)));
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(t) : "f"(fmaf(0.2316419f, a, 1.f)));
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(density) : "f"(a * (a * -0.72134752044448170f)));
        // The coefficients times 1 / sqrt(2 pi).
        float tail = fmaf(t, 0.53070271f, -0.72657601f);
        tail = fmaf(t, tail, 0.71070687f);
        tail = fmaf(t, tail, -0.14224836f);
        tail = fmaf(t, tail, 0.12741479f) * t * density;
        return fmaf(-a, tail, fmaxf(x, 0.f));
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
    const u32 column = (blockIdx.y * blockDim.x + threadIdx.x) * V, first = blockIdx.x * ROWS, rows = min(ROWS, n_rows - first);
    if (column >= n) return;
    act* at = x + (u64)first * n + column;
    if (n % V == 0) {
        uint4 y[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (r < rows) y[r] = *(uint4*)(at + (u64)r * n);
        }
        float b[V];
#pragma unroll
        for (int e = 0; e < V; e++) b[e] = bias[column + e];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (r >= rows) return;
            y[r].x = gelu_of_word(y[r].x, b);
            y[r].y = gelu_of_word(y[r].y, b + V / 4);
            y[r].z = gelu_of_word(y[r].z, b + V / 2);
            y[r].w = gelu_of_word(y[r].w, b + 3 * V / 4);
            *(uint4*)(at + (u64)r * n) = y[r];
        }
    } else {
        for (u32 r = 0; r < rows; r++) {
            for (u32 c = 0; c < min(V, n - column); c++) {
                act* element = at + (u64)r * n + c;
                store<1>(element, Vec<1>{{gelu(load<1>(element)[0] + bias[column + c])}});
            }
        }
    }
}
