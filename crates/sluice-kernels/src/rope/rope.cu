// A thread has one pair of frequencies of one token and turns it in every head. The angle is reduced to one turn in f64: at position
// 10^6 an f32 product is off by 0.03. What is left fits an f32 sine.
KERNEL rope(const act* __restrict__ x, const u32* __restrict__ positions, const float* __restrict__ inv_freq, act* __restrict__ y,
            u64 n_tokens, u32 t, u32 n_heads, u32 half, u32 interleaved, float direction) {
    const double TURN = 6.283185307179586476925;
    const u64 n = n_tokens * half;
    for (u64 at = blockIdx.x * (u64)blockDim.x + threadIdx.x; at < n; at += (u64)gridDim.x * blockDim.x) {
        const u64 token = at / half;
        const u32 i = (u32)(at % half);
        const double angle = (double)positions[token % t] * (double)inv_freq[i];
        const float rest = (float)(angle - rint(angle / TURN) * TURN);
        float s, c;
        sincosf(rest, &s, &c);
        s *= direction;
        const u32 first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + half;
        for (u32 h = 0; h < n_heads; h++) {
            const u64 head = (token * n_heads + h) * 2 * half;
            const float re = load<1>(x + head + first)[0], im = load<1>(x + head + second)[0];
            store<1>(y + head + first, {{re * c - im * s}});
            store<1>(y + head + second, {{im * c + re * s}});
        }
    }
}
