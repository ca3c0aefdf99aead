#define EACH(i, n) for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x)

// y = a + b in the format of y, four at a time and the rest one by one.
template <typename A, typename B>
__device__ __forceinline__ void sum(const A* a, const B* b, A* y, u64 n) {
    EACH(i, n / 4) {
        Vec<4> x = load<4>(a + 4 * i);
        const Vec<4> more = load<4>(b + 4 * i);
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] += more[e];
        store<4>(y + 4 * i, x);
    }
    EACH(i, n % 4) {
        const u64 at = n / 4 * 4 + i;
        Vec<1> x = load<1>(a + at);
        x[0] += load<1>(b + at)[0];
        store<1>(y + at, x);
    }
}

KERNEL add(const float* a, const act* b, float* y, u64 n) { sum(a, b, y, n); }

KERNEL add_assign(float* x, const act* more, u64 n) { sum(x, more, x, n); }

KERNEL add_assign_act(act* x, const act* more, u64 n) { sum(x, more, x, n); }
