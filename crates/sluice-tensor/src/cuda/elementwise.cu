// A thread strides over the whole, so any grid covers any length.
#define EACH(i, n) for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x)

template <typename From, typename To>
__device__ __forceinline__ void convert(const From* __restrict__ x, To* __restrict__ y, u64 n) {
    // Part of a tensor may begin at any element.
    const bool aligned = (((u64)x / sizeof(From)) | ((u64)y / sizeof(To))) % 4 == 0;
    const u64 fours = aligned ? n / 4 : 0;
    EACH(i, fours) store<4>(y + 4 * i, load<4>(x + 4 * i));
    EACH(i, n - 4 * fours) store<1>(y + 4 * fours + i, load<1>(x + 4 * fours + i));
}

KERNEL narrow(const float* __restrict__ x, u16* __restrict__ y, u64 n) { convert(x, y, n); }

KERNEL widen(const u16* __restrict__ x, float* __restrict__ y, u64 n) { convert(x, y, n); }

KERNEL clear(u16* __restrict__ x, u64 n) {
    EACH(i, n) x[i] = 0;
}

// Sets `differs` where any two numbers have different bits; all who do write the same.
KERNEL differ(const u16* __restrict__ x, const u16* __restrict__ y, u32* __restrict__ differs, u64 n) {
    bool here = false;
    EACH(i, n) here |= x[i] != y[i];
    if (here) *differs = 1;
}
