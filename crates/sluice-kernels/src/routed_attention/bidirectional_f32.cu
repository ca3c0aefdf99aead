// Routed attention of an encoder in f32 on the plain cores, forward: a query sees the routed keys of its sequence and a window centred on it.
// Follows attention_tile/walk_f32.cuh and slots.cuh.
// Compiled with HEAD_DIM, 64 or 128. That is the widest head that it serves.

// Arguments as in bidirectional_tf32.cu, then the width of a head. Grid: x = sequences times heads, y = tiles of queries; dynamic shared memory:
// what `walk_over_keys` says, then what `Slots` says.
extern "C" __global__ __launch_bounds__(THREADS) void routed_bidirectional_fwd(
    const float* q, const float* k, const float* v, const int* indices, const int* lens, float* o, float* lse, int T, int H, int G, int q_heads, int kv_heads,
    int n_places, int window, int most_steps, int d) {
    constexpr int W = HEAD_DIM, Q = 64, K = 64;
    extern __shared__ __align__(16) float shared[];
    const int b = blockIdx.x / H, h = blockIdx.x % H, kv_head = h / (H / G);
    const int first = blockIdx.y * Q, len = lens[b], n = max(min(Q, len - first), 0);
    Slots slots;
    slots.n = 0;
    if (n > 0) {
        unsigned char* memory = (unsigned char*)(shared + (Q + K) * (W + 1) + Q * (K + 1));
        slots.make<THREADS>(memory, indices + ((u64)b * G + kv_head) * n_places, n_places, most_steps, window, len, first, first + n - 1);
        __syncthreads();
    }
    // Where nobody sees anything, all is padding.
    walk_over_keys<W, Q, K>(
        shared, q, k, v, o, lse, d, slots.n > 0 ? n : 0, min(Q, T - first), slots.n,
        [&](u32 i) { return ((u64)b * T + first + i) * q_heads + h; },
        [&](u32 slot) { return ((u64)b * T + slots.position(slot)) * kv_heads + kv_head; },
        [&](u32 i, u32 slot) { return slots.seen(slot / 64, slots.slot_of_window(first + i)) >> slot % 64 & 1; },
        [&](u32 i) { return ((u64)b * T + first + i) * H + h; });
}
