#define EACH(i, n) for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x)

// exp of a large argument is inf and the quotient 0: both ends are right without a branch.
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

template <int V>
__device__ __forceinline__ void forward(const act* gate, const act* up, act* y, u64 at) {
    Vec<V> g = load<V>(gate + at);
    const Vec<V> u = load<V>(up + at);
#pragma unroll
    for (int e = 0; e < V; e++) g[e] = g[e] * sigmoid(g[e]) * u[e];
    store<V>(y + at, g);
}

template <int V>
__device__ __forceinline__ void backward(const act* dy, const act* gate, const act* up, act* dgate, act* dup, u64 at) {
    const Vec<V> d = load<V>(dy + at), g = load<V>(gate + at), u = load<V>(up + at);
    Vec<V> dg, du;
#pragma unroll
    for (int e = 0; e < V; e++) {
        const float s = sigmoid(g[e]), silu = g[e] * s;
        du[e] = d[e] * silu;
        dg[e] = d[e] * u[e] * fmaf(1.f - s, silu, s);
    }
    store<V>(dup + at, du);
    store<V>(dgate + at, dg);
}

// Four at a time, and the rest one by one.
KERNEL swiglu_fwd(const act* __restrict__ gate, const act* __restrict__ up, act* __restrict__ y, u64 n) {
    EACH(i, n / 4) forward<4>(gate, up, y, 4 * i);
    EACH(i, n % 4) forward<1>(gate, up, y, n / 4 * 4 + i);
}

KERNEL swiglu_bwd(const act* __restrict__ dy, const act* __restrict__ gate, const act* __restrict__ up, act* __restrict__ dgate,
                  act* __restrict__ dup, u64 n) {
    EACH(i, n / 4) backward<4>(dy, gate, up, dgate, dup, 4 * i);
    EACH(i, n % 4) backward<1>(dy, gate, up, dgate, dup, n / 4 * 4 + i);
}
