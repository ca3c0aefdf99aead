#define EACH(i, n) for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x)

KERNEL adamw_step(float* __restrict__ p, const float* __restrict__ grad, float* __restrict__ m, float* __restrict__ v, u64 n,
                  const float* __restrict__ grad_scale, float keep, float beta2, float one_minus_beta1, float one_minus_beta2, float step_size,
                  float inv_sqrt_correction2, float eps) {
    const float factor = grad_scale[0];
    if (!isfinite(factor)) return;  // the run ends as soon as somebody reads the norm
    EACH(i, n) {
        const float g = grad[i] * factor;
        const float mi = fmaf(g - m[i], one_minus_beta1, m[i]);
        const float vi = fmaf(one_minus_beta2 * g, g, beta2 * v[i]);
        m[i] = mi;
        v[i] = vi;
        p[i] = fmaf(p[i], keep, -step_size * (mi / fmaf(sqrtf(vi), inv_sqrt_correction2, eps)));
    }
}

// In f64: squares of f32 gradients overflow and vanish early. Block b leaves its sum in partial[b].
KERNEL sum_of_squares(const float* __restrict__ x, double* __restrict__ partial, u64 n) {
    double sum = 0.0;
    EACH(i, n) sum += (double)x[i] * (double)x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block adds up n sums: the norm, and the factor that brings it down to `clip`.
KERNEL norm_and_clip(const double* __restrict__ partial, u32 n, float clip, float* __restrict__ norm, float* __restrict__ factor) {
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    const float all = (float)sqrt(sum);
    norm[0] = all;
    factor[0] = !isfinite(all) ? __int_as_float(0x7fffffff) : all > clip ? clip / all : 1.f;
}

KERNEL scale(act* __restrict__ x, float f, u64 n) {
    EACH(i, n) store<1>(x + i, {{load<1>(x + i)[0] * f}});
}

KERNEL scale_by(act* __restrict__ x, const float* __restrict__ factor, u64 n) {
    const float f = factor[0];
    if (f == 1.f) return;  // the usual gradient of a loss
    EACH(i, n) store<1>(x + i, {{load<1>(x + i)[0] * f}});
}

KERNEL raise_to_zero(float* __restrict__ x, u64 n) {
    EACH(i, n) x[i] = fmaxf(x[i], 0.f);
}
