//! A vector of f32 as wide as the machine has, for kernels that block registers by hand.
//! Knows nothing about attention; loops that the compiler vectorises by itself belong in `vector_math`.
//!
//! A kernel is one `#[inline(always)]` body, generic over [`Simd`], called from [`crate::simd::dispatch`], which
//! compiles it inside a function with the right target features. Pointers are moved with `wrapping_add`: it
//! carries no checks of debug builds into the inner loops.

/// Operations on `LANES` numbers. Call them from loops and never from closures, which are functions of their own
/// without the target features: an instruction inside becomes a call.
///
/// All methods are unsafe for one reason: they may only run on a machine
/// that has the implementing type's instructions.
pub(crate) trait Simd: Copy {
    /// Numbers in one vector; divides 16.
    const LANES: usize;
    /// Vectors side by side in a register block at most. With sixteen registers two, or a block of useful height spills.
    const WIDE: usize;

    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self;
    /// All lanes the number at `from`.
    unsafe fn broadcast(from: *const f32) -> Self;
    /// Read `LANES` numbers; any alignment.
    unsafe fn load(from: *const f32) -> Self;
    /// Read `N` vectors that follow each other.
    #[inline(always)]
    unsafe fn load_array<const N: usize>(from: *const f32) -> [Self; N] {
        // SAFETY: the caller vouches for N x LANES readable numbers.
        unsafe {
            let mut x = [Self::splat(0.0); N];
            for i in 0..N {
                x[i] = Self::load(from.wrapping_add(i * Self::LANES));
            }
            x
        }
    }
    /// Read `LANES` f16 numbers, given as bits; any alignment.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// Write `LANES` numbers; any alignment.
    unsafe fn store(self, to: *mut f32);
    /// `self + b`.
    unsafe fn add(self, b: Self) -> Self;
    /// `self - b`.
    unsafe fn sub(self, b: Self) -> Self;
    /// `self * b`.
    unsafe fn mul(self, b: Self) -> Self;
    /// `self * b + c`.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// The larger one; `b` when either is NaN.
    unsafe fn max(self, b: Self) -> Self;
    /// The nearest integers.
    unsafe fn round(self) -> Self;
    /// `self * 2^n` for whole `n` in -150..=127; 0 when the result is far below the smallest normal number.
    unsafe fn scale_by_power(self, n: Self) -> Self;
    /// Sum of the lanes.
    unsafe fn sum(self) -> f32;
    /// Largest lane.
    unsafe fn max_lane(self) -> f32;

    /// Write `scale * block^T`: column `i` of `LANES` rows of as many numbers becomes `to[i]`. `scale` runs along a row.
    #[inline(always)]
    unsafe fn transpose(from: &[*const f32], scale: Self, to: &[*mut f32]) {
        let mut factors = [0.0f32; 16];
        // SAFETY: `LANES` is at most 16; the caller vouches for the rows.
        unsafe {
            scale.store(factors.as_mut_ptr());
            for (i, from) in from[..Self::LANES].iter().enumerate() {
                for (j, to) in to[..Self::LANES].iter().enumerate() {
                    to.wrapping_add(i).write(*from.wrapping_add(j) * factors[j]);
                }
            }
        }
    }

    /// `2^self` for `self <= 127`, relative error about 1e-7; -inf gives 0, NaN stays NaN.
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        // Minimax for the relative error on [-1/2, 1/2] (3e-9 before rounding), exact at 0.
        const C: [f32; 7] = [1.0, std::f32::consts::LN_2, 0.240_226_53, 0.055_503_106, 0.009_617_693, 0.001_340_664_4, 0.000_155_946_78];
        // SAFETY: the caller's machine has the instructions.
        unsafe {
            let x = Self::splat(-150.0).max(self);
            let n = x.round();
            let f = x.sub(n);
            let p = Self::splat(C[6]).mul_add(f, Self::splat(C[5])).mul_add(f, Self::splat(C[4]));
            let p = p.mul_add(f, Self::splat(C[3])).mul_add(f, Self::splat(C[2]));
            let p = p.mul_add(f, Self::splat(C[1])).mul_add(f, Self::splat(C[0]));
            p.scale_by_power(n)
        }
    }
}

/// Vectors for any machine; the compiler turns them into whatever the baseline has.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 8]);

impl Portable {
    #[inline(always)]
    fn map(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

impl Simd for Portable {
    const LANES: usize = 8;
    const WIDE: usize = 3;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 8])
    }
    #[inline(always)]
    unsafe fn broadcast(from: *const f32) -> Self {
        // SAFETY: the caller vouches for a readable number.
        Self([unsafe { *from }; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for 8 readable numbers.
        Self(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for 8 readable numbers.
        Self(unsafe { from.cast::<[u16; 8]>().read_unaligned() }.map(|bits| half::f16::from_bits(bits).to_f32_const()))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for 8 writable numbers.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.map(b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.map(b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.map(b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // Not f32::mul_add: without the instruction that is a call per number.
        Self(std::array::from_fn(|i| self.0[i] * b.0[i] + c.0[i]))
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.map(b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // Adding and subtracting 1.5 * 2^23 rounds to nearest, ties to even, for |x| < 2^22.
        const MAGIC: f32 = 12_582_912.0;
        self.map(self, |a, _| (a + MAGIC) - MAGIC)
    }
    #[inline(always)]
    unsafe fn scale_by_power(self, n: Self) -> Self {
        self.map(n, |a, n| a * f32::from_bits(((n.max(-127.0) as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Simd;

    // SAFETY of every block below: the trait's contract, the machine has AVX-512 F/DQ.
    impl Simd for __m512 {
        const LANES: usize = 16;
        const WIDE: usize = 3;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn broadcast(from: *const f32) -> Self {
            unsafe { _mm512_broadcastss_ps(_mm_load_ss(from)) }
        }
        // Loads and stores with a full mask become plain ones. The plain intrinsics are reads and writes of the
        // core library, which debug builds precede with checks of the pointer, a dozen instructions each.
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_maskz_loadu_ps(u16::MAX, from) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const u16) -> Self {
            unsafe { _mm512_cvtph_ps(_mm256_lddqu_si256(from.cast())) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_mask_storeu_ps(to, u16::MAX, self) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            unsafe { _mm512_add_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            unsafe { _mm512_sub_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            unsafe { _mm512_mul_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { _mm512_fmadd_ps(self, b, c) }
        }
        #[inline(always)]
        unsafe fn max(self, b: Self) -> Self {
            unsafe { _mm512_max_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self) }
        }
        #[inline(always)]
        unsafe fn scale_by_power(self, n: Self) -> Self {
            unsafe { _mm512_scalef_ps(self, n) }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe { _mm512_reduce_add_ps(self) }
        }
        #[inline(always)]
        unsafe fn max_lane(self) -> f32 {
            unsafe { _mm512_reduce_max_ps(self) }
        }
        #[inline(always)]
        unsafe fn transpose(from: &[*const f32], scale: Self, to: &[*mut f32]) {
            unsafe {
                let zero = _mm512_setzero_ps();
                let (mut x, mut y) = ([zero; 16], [zero; 16]);
                for i in 0..16 {
                    x[i] = Self::load(from[i]).mul(scale);
                }
                for i in 0..8 {
                    y[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
                    y[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
                }
                for i in 0..4 {
                    for j in 0..2 {
                        let (a, b) = (_mm512_castps_pd(y[4 * i + j]), _mm512_castps_pd(y[4 * i + 2 + j]));
                        x[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                        x[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
                    }
                }
                // Quarter q of x[4 i + j] is now column 4 q + j of rows 4 i..4 i + 4: exchange quarters.
                for j in 0..4 {
                    let even = _mm512_shuffle_f32x4::<0x88>(x[j], x[4 + j]);
                    let odd = _mm512_shuffle_f32x4::<0xdd>(x[j], x[4 + j]);
                    let low_even = _mm512_shuffle_f32x4::<0x88>(x[8 + j], x[12 + j]);
                    let low_odd = _mm512_shuffle_f32x4::<0xdd>(x[8 + j], x[12 + j]);
                    _mm512_shuffle_f32x4::<0x88>(even, low_even).store(to[j]);
                    _mm512_shuffle_f32x4::<0x88>(odd, low_odd).store(to[4 + j]);
                    _mm512_shuffle_f32x4::<0xdd>(even, low_even).store(to[8 + j]);
                    _mm512_shuffle_f32x4::<0xdd>(odd, low_odd).store(to[12 + j]);
                }
            }
        }
    }

    // SAFETY of every block below: the trait's contract, the machine has AVX2, FMA and F16C.
    impl Simd for __m256 {
        const LANES: usize = 8;
        const WIDE: usize = 2;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn broadcast(from: *const f32) -> Self {
            unsafe { _mm256_broadcastss_ps(_mm_load_ss(from)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const u16) -> Self {
            unsafe { _mm256_cvtph_ps(_mm_lddqu_si128(from.cast())) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            unsafe { _mm256_add_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            unsafe { _mm256_sub_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            unsafe { _mm256_mul_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { _mm256_fmadd_ps(self, b, c) }
        }
        #[inline(always)]
        unsafe fn max(self, b: Self) -> Self {
            unsafe { _mm256_max_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self) }
        }
        #[inline(always)]
        unsafe fn scale_by_power(self, n: Self) -> Self {
            unsafe {
                // 2^n is built from its exponent bits; -127 gives the bits of 0.
                let n = _mm256_cvtps_epi32(_mm256_max_ps(n, _mm256_set1_ps(-127.0)));
                let bits = _mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127)));
                _mm256_mul_ps(self, _mm256_castsi256_ps(bits))
            }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                let x = _mm_add_ps(_mm256_castps256_ps128(self), _mm256_extractf128_ps::<1>(self));
                let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
                _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
            }
        }
        #[inline(always)]
        unsafe fn max_lane(self) -> f32 {
            unsafe {
                let x = _mm_max_ps(_mm256_castps256_ps128(self), _mm256_extractf128_ps::<1>(self));
                let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
                _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
            }
        }
        #[inline(always)]
        unsafe fn transpose(from: &[*const f32], scale: Self, to: &[*mut f32]) {
            unsafe {
                let zero = _mm256_setzero_ps();
                let (mut x, mut y) = ([zero; 8], [zero; 8]);
                for i in 0..8 {
                    x[i] = Self::load(from[i]).mul(scale);
                }
                for i in 0..4 {
                    y[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
                    y[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
                }
                for i in 0..2 {
                    for j in 0..2 {
                        let (a, b) = (_mm256_castps_pd(y[4 * i + j]), _mm256_castps_pd(y[4 * i + 2 + j]));
                        x[4 * i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
                        x[4 * i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
                    }
                }
                // Half q of x[4 i + j] is now column 4 q + j of rows 4 i..4 i + 4: exchange halves.
                for j in 0..4 {
                    _mm256_permute2f128_ps::<0x20>(x[j], x[4 + j]).store(to[j]);
                    _mm256_permute2f128_ps::<0x31>(x[j], x[4 + j]).store(to[4 + j]);
                }
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;

    use super::Simd;

    // SAFETY of every block below: NEON is part of the aarch64 baseline.
    impl Simd for float32x4_t {
        const LANES: usize = 4;
        const WIDE: usize = 3;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { vdupq_n_f32(x) }
        }
        #[inline(always)]
        unsafe fn broadcast(from: *const f32) -> Self {
            unsafe { vld1q_dup_f32(from) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { vld1q_f32(from) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const u16) -> Self {
            // The vector conversion of half-precision numbers is not stable in the core library yet.
            let bits = unsafe { from.cast::<[u16; 4]>().read_unaligned() };
            let numbers = bits.map(|bits| half::f16::from_bits(bits).to_f32_const());
            unsafe { vld1q_f32(numbers.as_ptr()) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { vst1q_f32(to, self) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            unsafe { vaddq_f32(self, b) }
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            unsafe { vsubq_f32(self, b) }
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            unsafe { vmulq_f32(self, b) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { vfmaq_f32(c, self, b) }
        }
        #[inline(always)]
        unsafe fn max(self, b: Self) -> Self {
            // A comparison with NaN is false, which selects `b` as the other machines do.
            unsafe { vbslq_f32(vcgtq_f32(self, b), self, b) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            unsafe { vrndnq_f32(self) }
        }
        #[inline(always)]
        unsafe fn scale_by_power(self, n: Self) -> Self {
            unsafe {
                let n = vcvtnq_s32_f32(vmaxq_f32(n, vdupq_n_f32(-127.0)));
                vmulq_f32(self, vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127)))))
            }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe { vaddvq_f32(self) }
        }
        #[inline(always)]
        unsafe fn max_lane(self) -> f32 {
            unsafe { vmaxvq_f32(self) }
        }
    }
}

/// Define functions that run a generic body with this machine's vectors.
///
/// `dispatch! { pub(crate) unsafe fn name(arg: Type, ..) = body; }` calls `body::<V, M>(arg, ..)`, where `V: Simd` and
/// `M` is how many rows of accumulators, each up to three vectors wide, the machine's registers hold.
macro_rules! dispatch {
    ($($(#[$meta:meta])* $vis:vis unsafe fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident;)*) => {$(
        $(#[$meta])*
        $vis unsafe fn $name($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
                unsafe fn avx512($($arg: $ty),*) {
                    // SAFETY: the caller of the dispatching function keeps the body's contract.
                    unsafe { $body::<std::arch::x86_64::__m512, 8>($($arg),*) }
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                unsafe fn avx2($($arg: $ty),*) {
                    // SAFETY: as above.
                    unsafe { $body::<std::arch::x86_64::__m256, 4>($($arg),*) }
                }
                match $crate::vector_math::instruction_set() {
                    // SAFETY: `instruction_set` found these features on this machine; the rest is the caller's contract.
                    $crate::vector_math::InstructionSet::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::vector_math::InstructionSet::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::vector_math::InstructionSet::Baseline => {}
                }
            }
            #[cfg(target_arch = "aarch64")]
            // SAFETY: NEON is part of the baseline; the rest is the caller's contract.
            return unsafe { $body::<std::arch::aarch64::float32x4_t, 8>($($arg),*) };
            #[cfg(not(target_arch = "aarch64"))]
            // SAFETY: the caller's contract.
            unsafe { $body::<$crate::simd::Portable, 2>($($arg),*) }
        }
    )*};
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(always)]
    unsafe fn exp2_all<V: Simd, const M: usize>(x: &[f32], y: &mut [f32]) {
        for (x, y) in x.chunks_exact(V::LANES).zip(y.chunks_exact_mut(V::LANES)) {
            // SAFETY: both chunks have `LANES` numbers; `dispatch` chose V.
            unsafe { V::load(x.as_ptr()).exp2().store(y.as_mut_ptr()) }
        }
    }
    dispatch! { unsafe fn exp2_here(x: &[f32], y: &mut [f32]) = exp2_all; }

    #[inline(always)]
    unsafe fn transpose_all<V: Simd, const M: usize>(x: &[f32], y: &mut [f32]) {
        let (mut from, mut to) = ([x.as_ptr(); 16], [y.as_mut_ptr(); 16]);
        for i in 0..V::LANES {
            from[i] = x[i * 16..].as_ptr();
            to[i] = y[i * 16..].as_mut_ptr();
        }
        // SAFETY: there are 16 rows of 16 numbers; `dispatch` chose V.
        unsafe { V::transpose(&from, V::load(x.as_ptr()), &to) }
    }
    dispatch! { unsafe fn transpose_here(x: &[f32], y: &mut [f32]) = transpose_all; }

    #[test]
    fn transpose_moves_and_scales_every_number() {
        let x: Vec<f32> = (0..256).map(|i| 1.0 + i as f32).collect();
        let check = |run: &mut dyn FnMut(&[f32], &mut [f32])| {
            let mut y = vec![0.0; 256];
            run(&x, &mut y);
            let n = y[..16].iter().filter(|&&y| y != 0.0).count();
            for i in 0..16 {
                for j in 0..16 {
                    let want = if i < n && j < n { x[i * 16 + j] * x[j] } else { 0.0 };
                    assert_eq!(y[j * 16 + i], want, "{n} lanes, row {i}, column {j}");
                }
            }
            n
        };
        // SAFETY: both slices have 256 numbers, and the features are looked for.
        unsafe {
            assert!(check(&mut |x, y| transpose_here(x, y)) >= 4);
            assert_eq!(check(&mut |x, y| transpose_all::<Portable, 2>(x, y)), 8);
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                #[target_feature(enable = "avx2,fma,f16c")]
                unsafe fn avx2(x: &[f32], y: &mut [f32]) {
                    // SAFETY: the caller looked for the features.
                    unsafe { transpose_all::<std::arch::x86_64::__m256, 4>(x, y) }
                }
                assert_eq!(check(&mut |x, y| avx2(x, y)), 8);
            }
        }
    }

    #[test]
    fn exp2_is_close_to_the_real_one_for_every_vector() {
        let mut x: Vec<f32> = (0..16_000).map(|i| -126.0 + i as f32 * 0.008).collect();
        x.extend([f32::NEG_INFINITY, -1e30, -151.0, 0.0, -0.0, -1.0, 1.0, f32::NAN, 0.5, -0.5, 0.49999997, 2.0, -149.9, -140.0, 0.1, 0.2]);
        let (mut here, mut portable) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        // SAFETY: both slices have a length that is a multiple of 16.
        unsafe {
            exp2_here(&x, &mut here);
            exp2_all::<Portable, 2>(&x, &mut portable);
        }
        for y in [here, portable] {
            for (&x, &y) in x.iter().zip(&y) {
                let want = (x as f64).exp2();
                let ok = if x.is_nan() { y.is_nan() } else { (y as f64 - want).abs() <= 2e-7 * want + 1e-37 };
                assert!(ok, "2^{x} = {want}, found {y}");
            }
            assert_eq!((y[16_003], y[16_000]), (1.0, 0.0));
        }
    }
}
