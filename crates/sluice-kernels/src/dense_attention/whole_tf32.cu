// Attention of an encoder with factors rounded to TF32, forward only. Follows attention_tile/walk_tf32.cuh.

// q, o [B, T, H, D], k, v [B, T, G, D], lse [B, T, H]; from a token to the next are q_heads heads of q and kv_heads of k and v. Grid: x = sequences
// times heads, y = tiles of queries.
extern "C" __global__ __launch_bounds__(THREADS, 3) void whole_tf32_fwd(
    const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v, const int* __restrict__ lens, float* __restrict__ o,
    float* __restrict__ lse, int T, int H, int G, int q_heads, int kv_heads) {
    extern __shared__ __align__(16) u32 tiles[];
    const int b = blockIdx.x / H, h = blockIdx.x % H, first = blockIdx.y * ROWS, len = lens[b];
    // Tiles without a valid query have no keys to visit.
    const int steps = first < len ? (len + KEYS - 1) / KEYS : 0;
    const auto mask = [&](float (&s)[KEYS / 8][4], int step) {
        const int column = step * KEYS + threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (column + 8 * j + e >= len) s[j][e] = s[j][2 + e] = -INF;
            }
        }
    };
    const auto position = [&](int slot) { return min(slot, len - 1); };
    walk_over_keys(tiles, q, k, v, o, lse, b, h, first, len, T, H, h / (H / G), q_heads, kv_heads, steps, position, mask);
}
