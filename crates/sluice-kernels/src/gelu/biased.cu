// x = gelu(x + bias), a row of n columns per block, in place.

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

template <int V>
__device__ __forceinline__ void row(act* x, const float* bias, u32 n) {
#pragma unroll 4
    for (u32 i = threadIdx.x * V; i < n; i += blockDim.x * V) {
        Vec<V> y = load<V>(x + i);
        const Vec<V> b = load<V>(bias + i);
#pragma unroll
        for (int e = 0; e < V; e++) y[e] = gelu(y[e] + b[e]);
        store<V>(x + i, y);
    }
}

KERNEL gelu_biased(act* x, const float* __restrict__ bias, u32 n) {
    const u64 at = (u64)blockIdx.x * n;
    if (n % 4 == 0) row<4>(x + at, bias, n);
    else row<1>(x + at, bias, n);
}
