// Attention of encoders over up to 128 tokens: a head's queries, keys and values are a tile each, so that the softmax sees all keys at once.
// Factors bf16, sums and softmax f32. Follows attention_tile/tile.cuh.
//
// The work on a head is short against the time that its tiles take to come, so a block stays for several heads and fetches the next one's tiles first.

constexpr int ROWS = 128, THREADS = 256, KEYS = 64;
// Bytes of the tile of queries; of 64 keys or values; of all that a head reads.
constexpr int TILE = ROWS * D * 2, HALF = KEYS * D * 2, STAGE = 3 * TILE;

// Logits of 64 keys from `first` on: those that are padding count for nothing. Returns the largest ones of a thread's two rows in `max0` and `max1`.
__device__ __forceinline__ void mask(float (&s)[KEYS / 8][4], int first, int len, float& max0, float& max1) {
    const int column = first + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (column + 8 * j + e >= len) s[j][e] = s[j][2 + e] = -infinity();
            max0 = fmaxf(max0, s[j][e]);
            max1 = fmaxf(max1, s[j][2 + e]);
        }
    }
}

// o [B, T, H, D]. `stride`: heads from a token to the next in q, k and v.
extern "C" __global__ __launch_bounds__(THREADS, 2) void short_bf16_fwd(const bf16* q, const bf16* k, const bf16* v, const int* lens, bf16* o, int stride, int B, int T, int H) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int n = B * H;
    const auto fetch = [&](int head, int stage) {
        const int b = head / H, len = head < n ? lens[b] : 0;
        if (len > 0) {
            const u32 to = shared_address(shared) + stage * STAGE;
            const auto at = [&](int i) { return ((u32)b * T + min(i, len - 1)) * stride + head % H; };
            copy_rows<ROWS, D, THREADS>(to, q, at);
            copy_rows<KEYS, D, THREADS>(to + TILE, k, at);
            copy_rows<KEYS, D, THREADS>(to + TILE + HALF, k, [&](int i) { return at(KEYS + i); });
            copy_rows<KEYS, D, THREADS>(to + 2 * TILE, v, at);
            copy_rows<KEYS, D, THREADS>(to + 2 * TILE + HALF, v, [&](int i) { return at(KEYS + i); });
        }
        copies_commit();
    };
    const float scale = LOG2E * rsqrtf((float)D);
    fetch(blockIdx.x, 0);
    for (int head = blockIdx.x, stage = 0; head < n; head += gridDim.x, stage ^= 1) {
        // Nobody reads the other stage any more.
        __syncthreads();
        fetch(head + gridDim.x, stage ^ 1);
        copies_wait<1>();
        __syncthreads();
        const int b = head / H, len = lens[b];
        const auto target = [&](int i) { return ((u32)b * T + i) * H + head % H; };
        for (int i = len * (D / 8) + threadIdx.x; i < T * (D / 8); i += THREADS) *(uint4*)(o + (u64)target(i / (D / 8)) * D + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
        if (len == 0) continue;
        const u32 q_tile = shared_address(shared) + stage * STAGE, k_tile = q_tile + TILE, v_tile = k_tile + TILE;
        float near[KEYS / 8][4], far[KEYS / 8][4];
        products_begin();
        product_of_tiles<D, ROWS, KEYS>(near, q_tile, warpgroup() * 64, k_tile);
        product_of_tiles<D, ROWS, KEYS>(far, q_tile, warpgroup() * 64, k_tile + HALF);
        products_commit();
        products_wait<0>();
        float max0 = -infinity(), max1 = -infinity(), sum0 = 0.0f, sum1 = 0.0f;
        mask(near, 0, len, max0, max1);
        mask(far, KEYS, len, max0, max1);
        const float top0 = quad_max(max0) * scale, top1 = quad_max(max1) * scale;
        u32 weights[2][KEYS / 16][4];
        exponentials(near, scale, top0, top1, sum0, sum1);
        to_fragments<KEYS>(weights[0], near);
        exponentials(far, scale, top0, top1, sum0, sum1);
        to_fragments<KEYS>(weights[1], far);
        // All products with the queries are done: their tile takes the results.
        __syncthreads();
        float out[D / 8][4] = {};
        products_begin();
        product_with_tile<KEYS, D>(out, weights[0], v_tile);
        product_with_tile<KEYS, D>(out, weights[1], v_tile + HALF);
        products_commit();
        products_wait<0>();
        unsigned char* tile = shared + stage * STAGE;
        accumulators_to_tile<ROWS, D>(tile, threadIdx.x / 32 * 16, out, 1.0f / quad_sum(sum0), 1.0f / quad_sum(sum1));
        __syncthreads();
        store_rows<ROWS, D, THREADS>(tile, o, len, target);
    }
    copies_wait<0>();
}
