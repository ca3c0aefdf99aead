// Routed attention of an encoder with factors rounded to TF32, forward: a query sees the routed keys of its sequence and a window centred on it.
// Follows attention_tile/walk_tf32.cuh and slots.cuh.

// q, o [B, T, H, D], k, v [B, T, G, D], lse [B, T, H], indices [B, 1, G, n_places]; from a token to the next are q_heads heads of q and kv_heads of
// k and v. Grid: x = sequences times heads, y = tiles of queries; dynamic shared memory: what `walk_over_keys` says, then what `Slots` says.
extern "C" __global__ __launch_bounds__(THREADS, 3) void routed_bidirectional_fwd(
    const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v, const int* __restrict__ indices, const int* __restrict__ lens,
    float* __restrict__ o, float* __restrict__ lse, int T, int H, int G, int q_heads, int kv_heads, int n_places, int window, int most_steps) {
    extern __shared__ __align__(16) u32 tiles[];
    const int b = blockIdx.x / H, h = blockIdx.x % H, kv_head = h / (H / G);
    const int first = blockIdx.y * ROWS, len = lens[b], last = min(first + ROWS, len) - 1;
    Slots slots;
    slots.n = 0;
    if (first < len) {
        unsigned char* memory = (unsigned char*)(tiles + 4 * KEYS * STRIDE);
        slots.make<THREADS>(memory, indices + ((u64)b * G + kv_head) * n_places, n_places, most_steps, window, len, first, last);
        __syncthreads();
    }
    const int window0 = slots.slot_of_window(first + query_of_thread()), window1 = slots.slot_of_window(first + query_of_thread() + 8);
    // Where nobody sees anything, all is padding.
    walk_over_keys(
        tiles, q, k, v, o, lse, b, h, first, slots.n > 0 ? len : 0, T, H, kv_head, q_heads, kv_heads, slots.steps(),
        [&](int slot) { return slots.position(slot); }, [&](float (&s)[KEYS / 8][4], int step) { slots.hide(s, step, window0, window1); });
}
