// What every kernel source begins with. NVRTC alone must suffice: nothing is included.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define KERNEL extern "C" __global__ void

// bf16 is the upper half of an f32; rounding is to nearest, ties to even, and NaN stays NaN.
__device__ __forceinline__ float from_bf16(u16 x) { return __uint_as_float((u32)x << 16); }

__device__ __forceinline__ u16 to_bf16(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)((bits >> 16) | 0x40u);
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// V (1 or 4) neighbouring numbers of either format as floats. Four of them begin at a multiple of four.
template <int V>
struct Vec {
    float v[V];
    __device__ __forceinline__ float& operator[](int i) { return v[i]; }
    __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};

template <int V>
__device__ __forceinline__ Vec<V> load(const float* p) {
    if constexpr (V == 4) {
        const float4 x = *(const float4*)p;
        return {{x.x, x.y, x.z, x.w}};
    } else {
        return {{*p}};
    }
}

template <int V>
__device__ __forceinline__ Vec<V> load(const u16* p) {
    if constexpr (V == 4) {
        const uint2 x = *(const uint2*)p;
        return {{__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u), __uint_as_float(x.y << 16), __uint_as_float(x.y & 0xffff0000u)}};
    } else {
        return {{from_bf16(*p)}};
    }
}

template <int V>
__device__ __forceinline__ void store(float* p, const Vec<V>& x) {
    if constexpr (V == 4) *(float4*)p = make_float4(x[0], x[1], x[2], x[3]);
    else *p = x[0];
}

// Two floats as bf16, the first in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

template <int V>
__device__ __forceinline__ void store(u16* p, const Vec<V>& x) {
    if constexpr (V == 4) *(uint2*)p = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
    else *p = to_bf16(x[0]);
}

#define INF __int_as_float(0x7f800000)

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

// Sum over a block of up to 1024 threads, a multiple of 32; every thread gets it, always added in the same order.
template <typename T>
__device__ __forceinline__ T block_sum(T x) {
    __shared__ T partial[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
    x = warp_sum(x);
    __syncthreads();  // an earlier sum may still be read
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = lane < n_warps ? partial[lane] : T(0);
    return warp_sum(x);
}
