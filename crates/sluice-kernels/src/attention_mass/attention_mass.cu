// Attention that keys receive: products of 64 queries and 64 keys in registers, turned into weights, added to the sum of
// their key and forgotten. Factors are f32 in every precision. 256 threads; thread (y, x) has queries 4 y.. and keys 4 x.. of a tile.
constexpr u32 TILE = 64, DEPTH = 32, PITCH = TILE + 4, THREADS = 256;

struct Shared {
    float q[DEPTH][PITCH], k[DEPTH][PITCH];
    float lse[TILE], weight[TILE];
    u32 at[TILE];
    float sums[16][TILE];
};

struct Dims {
    u32 n_heads, n_kv_heads, head_dim;
};

// What the keys `s.at[..n_keys]` of KV head `g` receive from the queries `first..last` that are `youngest <= age < oldest` away, over the
// heads of the group. Pointers are the sequence's; the two weights may be null. Sums of this thread's keys and queries.
__device__ __forceinline__ void add_mass(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ lse,
                                         const float* __restrict__ key_weight, const float* __restrict__ query_weight, Shared& s,
                                         u32 n_keys, u32 first, u32 last, u32 youngest, u32 oldest, u32 g, Dims dims, float power,
                                         float scale, float (&total)[4]) {
    const u32 y = threadIdx.x / 16, x = threadIdx.x % 16, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 d_all = dims.head_dim, group = dims.n_heads / dims.n_kv_heads;
    for (u32 h = g * group; h < (g + 1) * group; h++) {
        float of_head[4] = {};
        for (u32 begin = first; begin < last; begin += TILE) {
            float z[4][4] = {};
            for (u32 d0 = 0; d0 < d_all; d0 += DEPTH) {
                __syncthreads();  // the last tile has been read
                for (u32 row = warp; row < TILE; row += THREADS / 32) {
                    const u32 d = d0 + lane, t = begin + row;
                    s.q[lane][row] = t < last && d < d_all ? q[((u64)t * dims.n_heads + h) * d_all + d] : 0.f;
                    s.k[lane][row] = row < n_keys && d < d_all ? k[((u64)s.at[row] * dims.n_kv_heads + g) * d_all + d] : 0.f;
                }
                if (d0 == 0 && threadIdx.x < TILE) {
                    const u32 t = begin + threadIdx.x;
                    s.lse[threadIdx.x] = t < last ? lse[(u64)t * dims.n_heads + h] : 0.f;
                    s.weight[threadIdx.x] = t < last && query_weight ? query_weight[t] : 1.f;
                }
                __syncthreads();
#pragma unroll 8
                for (u32 d = 0; d < DEPTH; d++) {
                    const float4 a = *(const float4*)&s.q[d][4 * y], b = *(const float4*)&s.k[d][4 * x];
                    const float av[4] = {a.x, a.y, a.z, a.w}, bv[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int j = 0; j < 4; j++) z[i][j] = fmaf(av[i], bv[j], z[i][j]);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 t = begin + 4 * y + i;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const u32 key = 4 * x + j;
                    if (t >= last || key >= n_keys || t < s.at[key]) continue;
                    const u32 age = t - s.at[key];
                    if (age < youngest || age >= oldest) continue;
                    of_head[j] = fmaf(expf(power * fmaf(z[i][j], scale, -s.lse[4 * y + i])), s.weight[4 * y + i], of_head[j]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 key = 4 * x + j;
            const float factor = key_weight && key < n_keys ? key_weight[(u64)s.at[key] * dims.n_heads + h] : 1.f;
            total[j] = fmaf(of_head[j], factor, total[j]);
        }
    }
}

// The sum of a key over all threads, in threads 0..TILE.
__device__ __forceinline__ float sum_of_key(Shared& s, const float (&total)[4]) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; j++) s.sums[threadIdx.x / 16][4 * (threadIdx.x % 16) + j] = total[j];
    __syncthreads();
    float sum = 0.f;
    if (threadIdx.x < TILE)
#pragma unroll
        for (int y = 0; y < 16; y++) sum += s.sums[y][threadIdx.x];
    return sum;
}

// One sequence of `len` tokens. Keys are (position, place in the list) by position, tile i those from `tiles[i]` to `tiles[i + 1]`.
// Grid [n_tiles, G, parts]; every part has some of the queries. partial [parts, n, G].
KERNEL __launch_bounds__(THREADS) future_mass(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ lse,
                                              const float* __restrict__ key_weight, const float* __restrict__ query_weight,
                                              const uint2* __restrict__ keys, const u32* __restrict__ tiles, float* __restrict__ partial,
                                              u32 n, u32 len, u32 window, u32 end, u32 n_heads, u32 n_kv_heads, u32 head_dim, float power,
                                              float scale) {
    __shared__ __align__(16) Shared s;
    const u32 from = tiles[blockIdx.x], n_keys = tiles[blockIdx.x + 1] - from, g = blockIdx.y;
    if (threadIdx.x < n_keys) s.at[threadIdx.x] = keys[from + threadIdx.x].x;
    __syncthreads();
    const u64 begin = (u64)s.at[0] + window, stop = min((u64)s.at[n_keys - 1] + end, (u64)len);
    float total[4] = {};
    if (begin < stop) {
        const u32 n_tiles = ((u32)(stop - begin) + TILE - 1) / TILE, share = (n_tiles + gridDim.z - 1) / gridDim.z * TILE;
        const u64 first = begin + blockIdx.z * share, last = min(first + share, stop);
        if (first < last)
            add_mass(q, k, lse, key_weight, query_weight, s, n_keys, (u32)first, (u32)last, window, end, g,
                     {n_heads, n_kv_heads, head_dim}, power, scale, total);
    }
    const float sum = sum_of_key(s, total);
    if (threadIdx.x < n_keys) partial[((u64)blockIdx.z * n + keys[from + threadIdx.x].y) * n_kv_heads + g] = sum;
}

// mass [B, n_blocks, G, T]. Grid [key tiles, n_blocks, B * G].
KERNEL __launch_bounds__(THREADS) block_mass(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ lse,
                                             const u32* __restrict__ lens, float* __restrict__ mass, u32 t, u32 every, u32 n_heads,
                                             u32 n_kv_heads, u32 head_dim, float power, float scale) {
    __shared__ __align__(16) Shared s;
    const u32 first_key = blockIdx.x * TILE, b = blockIdx.z / n_kv_heads, g = blockIdx.z % n_kv_heads;
    const u32 n_keys = min(TILE, t - first_key);
    if (threadIdx.x < n_keys) s.at[threadIdx.x] = first_key + threadIdx.x;
    const u64 begin = (u64)blockIdx.y * every;
    const u32 last = (u32)min(begin + every, (u64)lens[b]), first = max((u32)begin, first_key);
    float total[4] = {};
    if (first < last)
        add_mass(q + (u64)b * t * n_heads * head_dim, k + (u64)b * t * n_kv_heads * head_dim, lse + (u64)b * t * n_heads, nullptr, nullptr,
                 s, n_keys, first, last, 0, 0xffffffffu, g, {n_heads, n_kv_heads, head_dim}, power, scale, total);
    const float sum = sum_of_key(s, total);
    if (threadIdx.x < n_keys) mass[(((u64)b * gridDim.y + blockIdx.y) * n_kv_heads + g) * t + first_key + threadIdx.x] = sum;
}
