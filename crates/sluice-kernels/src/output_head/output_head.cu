// Block b has row b of a chunk of logits. Every reduction is a tree over the block: one order, whatever else runs.
constexpr u32 N = 256;

template <typename T, typename Merge>
__device__ __forceinline__ T reduce(T x, Merge merge) {
    __shared__ T all[N];
    __syncthreads();  // an earlier result may still be read
    all[threadIdx.x] = x;
    __syncthreads();
#pragma unroll
    for (u32 d = N / 2; d > 0; d >>= 1) {
        if (threadIdx.x < d) all[threadIdx.x] = merge(all[threadIdx.x], all[threadIdx.x + d]);
        __syncthreads();
    }
    return all[0];
}

__device__ __forceinline__ float sum_all(float x) {
    return reduce(x, [](float a, float b) { return a + b; });
}

// The largest value, the lowest index among equals, and the largest of the others.
struct Best {
    float value, second;
    u32 index;
};

__device__ __forceinline__ Best no_best() { return {-INF, -INF, 0xffffffffu}; }

__device__ __forceinline__ void take(Best& b, float value, u32 index) {
    if (value > b.value || (b.index == 0xffffffffu && value == -INF)) {
        b.second = b.value;
        b.value = value;
        b.index = index;
    } else if (value > b.second) {
        b.second = value;
    }
}

__device__ __forceinline__ Best merge(const Best& a, const Best& b) {
    const bool first = a.value > b.value || (a.value == b.value && a.index < b.index);
    const Best& w = first ? a : b;
    const Best& l = first ? b : a;
    return {w.value, fmaxf(w.second, l.value), w.index};
}

__device__ __forceinline__ Best best_all(Best b) {
    return reduce(b, [](const Best& a, const Best& b) { return merge(a, b); });
}

// Threads that share a row of logits in `cross_entropy`: many, so that what all blocks work on stays in the L2 cache between its two passes.
constexpr u32 WIDE = 1024;

// The largest logit with its index, and the sum of exp(z - value).
struct Peak {
    float value, sum;
    u32 index;
};

__device__ __forceinline__ void take(Peak& p, float z, u32 index) {
    if (z > p.value || (p.index == 0xffffffffu && z == -INF)) {
        p.sum *= expf(p.value - z);
        p.value = z;
        p.index = index;
    }
}

__device__ __forceinline__ Peak merge(const Peak& a, const Peak& b) {
    const bool first = a.value > b.value || (a.value == b.value && a.index < b.index);
    const Peak& w = first ? a : b;
    const Peak& l = first ? b : a;
    return {w.value, w.sum + (l.sum == 0.f ? 0.f : l.sum * expf(l.value - w.value)), w.index};
}

template <int V>
__device__ __forceinline__ void cross_entropy_of_row(act* z, u32 target, float weight, u32* results, u32 vocab, bool gradient) {
    __shared__ Peak all[WIDE];
    const float z_target = load<1>(z + target)[0];
    Peak p = {-INF, 0.f, 0xffffffffu};
    for (u32 j = threadIdx.x * V; j < vocab; j += WIDE * V) {
        const Vec<V> x = load<V>(z + j);
#pragma unroll
        for (int e = 0; e < V; e++) take(p, x[e], j + e);
#pragma unroll
        for (int e = 0; e < V; e++) p.sum += expf(x[e] - p.value);
    }
    all[threadIdx.x] = p;
    __syncthreads();
#pragma unroll
    for (u32 d = WIDE / 2; d > 0; d >>= 1) {
        if (threadIdx.x < d) all[threadIdx.x] = merge(all[threadIdx.x], all[threadIdx.x + d]);
        __syncthreads();
    }
    p = all[0];
    // Without a number among the logits there is no largest one, and everything is NaN.
    const float max = p.index == 0xffffffffu ? __int_as_float(0x7fffffff) : p.value;
    if (threadIdx.x == 0) {
        results[0] = __float_as_uint((max - z_target) + logf(p.sum));
        results[1] = p.index;
        results[2] = __float_as_uint(1.f / p.sum);
    }
    if (!gradient) return;
    const float a = weight / p.sum;
    for (u32 j = threadIdx.x * V; j < vocab; j += WIDE * V) {
        Vec<V> x = load<V>(z + j);
#pragma unroll
        for (int e = 0; e < V; e++) x[e] = a * expf(x[e] - max) - (j + e == target ? weight : 0.f);
        store<V>(z + j, x);
    }
}

// results [rows, 3]: nll, top1, its probability. With `gradient`, z becomes weight (softmax(z) - onehot(target)).
KERNEL __launch_bounds__(1024) cross_entropy(act* __restrict__ z, const u32* __restrict__ targets, const float* __restrict__ weights, u32* __restrict__ results,
                                             u32 vocab, u32 gradient) {
    const u32 row = blockIdx.x;
    z += (u64)row * vocab, results += row * 3;
    if (vocab % 4 == 0) cross_entropy_of_row<4>(z, targets[row], weights[row], results, vocab, gradient);
    else cross_entropy_of_row<1>(z, targets[row], weights[row], results, vocab, gradient);
}

// p = exp((z - max) scale) / sum
struct Softmax {
    float max, scale, log_sum;
    __device__ __forceinline__ float log_probability(float z) const { return (z - max) * scale - log_sum; }
};

__device__ __forceinline__ Softmax softmax_of(const float* z, u32 vocab, float max, float scale) {
    float sum = 0.f;
    for (u32 j = threadIdx.x; j < vocab; j += N) sum += expf((z[j] - max) * scale);
    return {max, scale, logf(sum_all(sum))};
}

// results [rows, 6]: kl, boundary, nll of the student, nll of the teacher, whether both agree, the student's top1.
// With `gradient`, z_s becomes the gradient of the weighted loss. `targets` may be null.
KERNEL distill(float* __restrict__ z_s, const float* __restrict__ z_t, const u32* __restrict__ targets, const float* __restrict__ weights,
               u32* __restrict__ results, u32 vocab, u32 gradient, float kl_term, float ce_term, float boundary_term, float temperature,
               float margin_cap, float delta, float width) {
    const u32 row = blockIdx.x;
    const float NAN_ = __int_as_float(0x7fffffff);
    z_s += (u64)row * vocab;
    z_t += (u64)row * vocab;
    results += (u64)row * 6;
    Best t = no_best(), s = no_best();
    for (u32 j = threadIdx.x; j < vocab; j += N) {
        take(t, z_t[j], j);
        take(s, z_s[j], j);
    }
    t = best_all(t);
    s = best_all(s);
    if (t.index == 0xffffffffu || s.index == 0xffffffffu) {
        // No number among the logits: the run has diverged, and the losses must say so.
        for (u32 j = threadIdx.x; j < vocab; j += N) z_s[j] = NAN_;
        if (threadIdx.x < 4) results[threadIdx.x] = __float_as_uint(NAN_);
        if (threadIdx.x == 4) results[4] = 0;
        if (threadIdx.x == 5) results[5] = 0xffffffffu;
        return;
    }
    const u32 chosen = t.index;
    Best other = no_best();
    if (s.index == chosen) {
        for (u32 j = threadIdx.x; j < vocab; j += N)
            if (j != chosen) take(other, z_s[j], j);
        other = best_all(other);
    } else {
        other = s;
    }
    const float inv_t = 1.f / temperature;
    const Softmax student = softmax_of(z_s, vocab, s.value, inv_t), teacher = softmax_of(z_t, vocab, t.value, inv_t);
    const bool plain = temperature == 1.f;
    const Softmax plain_student = plain ? student : softmax_of(z_s, vocab, s.value, 1.f);
    const bool has_target = targets != nullptr;
    const u32 target = has_target ? targets[row] : 0;
    float nll_s = 0.f, nll_t = 0.f;
    if (has_target) {
        const Softmax plain_teacher = plain ? teacher : softmax_of(z_t, vocab, t.value, 1.f);
        nll_s = -plain_student.log_probability(z_s[target]);
        nll_t = -plain_teacher.log_probability(z_t[target]);
    }
    float boundary = 0.f, slope = 0.f;
    const bool has_other = other.index != 0xffffffffu;
    if (has_other) {
        const float lead = t.value - t.second;
        const float omega = 1.f / (1.f + expf((lead - delta) / width));
        const float wanted = fminf(t.value - z_t[other.index], margin_cap);
        const float missing = fmaxf(wanted - (z_s[chosen] - other.value), 0.f);
        boundary = omega * missing * missing;
        slope = -2.f * omega * missing;
    }
    const float weight = gradient ? weights[row] : 0.f;
    const float kl_factor = weight * kl_term * temperature, ce_factor = weight * ce_term;
    __syncthreads();  // every thread has read the logits that are about to change
    float kl = 0.f;
    for (u32 j = threadIdx.x; j < vocab; j += N) {
        const float log_s = student.log_probability(z_s[j]), log_t = teacher.log_probability(z_t[j]);
        const float p_s = expf(log_s), p_t = expf(log_t);
        // p_T (log p_T - log p_S) - p_T + p_S: never negative, and the rounding of the two sums cancels.
        kl += (p_t > 0.f ? p_t * (log_t - log_s) : 0.f) - (p_t - p_s);
        if (gradient) {
            float g = fmaf(ce_factor, expf(plain_student.log_probability(z_s[j])), kl_factor * (p_s - p_t));
            if (has_target && j == target) g -= ce_factor;
            if (has_other && j == chosen) g += weight * boundary_term * slope;
            if (has_other && j == other.index) g -= weight * boundary_term * slope;
            z_s[j] = g;
        }
    }
    kl = sum_all(kl);
    if (threadIdx.x == 0) {
        results[0] = __float_as_uint(temperature * temperature * kl);
        results[1] = __float_as_uint(boundary);
        results[2] = __float_as_uint(nll_s);
        results[3] = __float_as_uint(nll_t);
        results[4] = s.index == t.index;
        results[5] = s.index;
    }
}

// One block. loss = sum of weight (a f[0] + b f[1] + c f[2]) over rows of `width` figures, first = sum of weight f[0]; a figure without a factor may
// be anything, and so may those of a row of weight 0.
KERNEL weighted_sums(const float* __restrict__ figures, const float* __restrict__ weights, u32 rows, u32 width, float a, float b, float c,
                     float* __restrict__ loss, float* __restrict__ first) {
    double sum = 0.0, of_first = 0.0;
    for (u32 i = threadIdx.x; i < rows; i += blockDim.x) {
        const double weight = weights[i];
        if (weight == 0.0) continue;
        const float* f = figures + (u64)i * width;
        double x = (double)a * f[0];
        if (b != 0.f) x += (double)b * f[1];
        if (c != 0.f) x += (double)c * f[2];
        sum += weight * x;
        of_first += weight * f[0];
    }
    sum = block_sum(sum);
    of_first = block_sum(of_first);
    if (threadIdx.x == 0) loss[0] = (float)sum, first[0] = (float)of_first;
}

KERNEL gather_rows(const act* __restrict__ x, const u32* __restrict__ rows, act* __restrict__ y, u64 n, u32 m) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) y[i] = x[(u64)rows[i / m] * m + i % m];
}

KERNEL scatter_rows(const act* __restrict__ x, const u32* __restrict__ rows, act* __restrict__ y, u64 n, u32 m) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) y[(u64)rows[i / m] * m + i % m] = x[i];
}
