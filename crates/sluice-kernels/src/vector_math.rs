//! Elementary functions and reductions on f32 slices, written so that the compiler vectorises them.
//! Knows nothing about tensors or threads.
//!
//! Every slice function exists once as a plain loop and is compiled for AVX-512, for AVX2 and for the
//! baseline; the right one is chosen at run time. All of them round identically: sums run in 32 fixed lanes
//! and fused multiply-adds are spelled out, so a result does not depend on the machine's vector width.

use std::f32::consts::LOG2_E;

/// Compile a loop for several instruction sets and choose at run time.
///
/// `vectorised! { pub(crate) fn name(x: &[f32], y: &mut [f32]) { .. } }` defines `name`; what its body calls
/// must be `#[inline(always)]`, or it is compiled for the baseline only.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[inline]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                match $crate::vector_math::instruction_set() {
                    // SAFETY: `instruction_set` found these features on this machine.
                    $crate::vector_math::InstructionSet::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::vector_math::InstructionSet::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::vector_math::InstructionSet::Baseline => {}
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorised;

/// What this machine can run.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum InstructionSet {
    Avx512,
    Avx2,
    Baseline,
}

/// The best of them; the standard library caches the answer.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn instruction_set() -> InstructionSet {
    if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
    {
        InstructionSet::Avx512
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        InstructionSet::Avx2
    } else {
        InstructionSet::Baseline
    }
}

vectorised! {
    /// Sum of `exp(x - shift)`; with the maximum as `shift` it neither overflows nor vanishes.
    pub(crate) fn sum_exp(xs: &[f32], shift: f32) -> f32 {
        let mut acc = [0.0; LANES];
        let (chunks, rest) = xs.as_chunks::<LANES>();
        for x in chunks {
            for i in 0..LANES {
                acc[i] += exp(x[i] - shift);
            }
        }
        if !rest.is_empty() {
            let x = padded(rest, f32::NEG_INFINITY);
            for i in 0..LANES {
                acc[i] += exp(x[i] - shift);
            }
        }
        add_lanes(acc)
    }
}

vectorised! {
    /// Each element becomes `exp(x - shift)`; returns their sum.
    pub(crate) fn exp_in_place(xs: &mut [f32], shift: f32) -> f32 {
        let mut acc = [0.0; LANES];
        let (chunks, rest) = xs.as_chunks_mut::<LANES>();
        for x in chunks {
            for i in 0..LANES {
                x[i] = exp(x[i] - shift);
                acc[i] += x[i];
            }
        }
        let mut sum = add_lanes(acc);
        for x in rest {
            *x = exp(*x - shift);
            sum += *x;
        }
        sum
    }
}

vectorised! {
    /// Largest element, `-inf` for none; NaN is skipped.
    pub(crate) fn max(xs: &[f32]) -> f32 {
        let mut acc = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = xs.as_chunks::<LANES>();
        for x in chunks {
            for i in 0..LANES {
                acc[i] = if x[i] > acc[i] { x[i] } else { acc[i] };
            }
        }
        if !rest.is_empty() {
            let x = padded(rest, f32::NEG_INFINITY);
            for i in 0..LANES {
                acc[i] = if x[i] > acc[i] { x[i] } else { acc[i] };
            }
        }
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                acc[i] = if acc[i + half] > acc[i] { acc[i + half] } else { acc[i] };
            }
            half /= 2;
        }
        acc[0]
    }
}

/// Index and value of the largest element, the first one among equals; `None` without a number in `xs`.
pub(crate) fn argmax(xs: &[f32]) -> Option<(usize, f32)> {
    let best = max(xs);
    xs.iter().position(|&x| x == best).map(|i| (i, best))
}

vectorised! {
    /// Sum of the elements.
    pub(crate) fn sum(xs: &[f32]) -> f32 {
        let mut acc = [0.0; LANES];
        let (chunks, rest) = xs.as_chunks::<LANES>();
        for x in chunks {
            for i in 0..LANES {
                acc[i] += x[i];
            }
        }
        if !rest.is_empty() {
            let x = padded(rest, 0.0);
            for i in 0..LANES {
                acc[i] += x[i];
            }
        }
        add_lanes(acc)
    }
}

vectorised! {
    /// Inner product of the common prefix.
    pub(crate) fn dot(xs: &[f32], ys: &[f32]) -> f32 {
        dot_body(xs, ys)
    }
}

vectorised! {
    /// `y += a x`.
    pub(crate) fn axpy(a: f32, xs: &[f32], ys: &mut [f32]) {
        for (y, x) in ys.iter_mut().zip(xs) {
            *y = x.mul_add(a, *y);
        }
    }
}

vectorised! {
    /// `y += x`.
    pub(crate) fn add_assign(ys: &mut [f32], xs: &[f32]) {
        for (y, x) in ys.iter_mut().zip(xs) {
            *y += x;
        }
    }
}

vectorised! {
    /// `x *= a`.
    pub(crate) fn scale(xs: &mut [f32], a: f32) {
        for x in xs {
            *x *= a;
        }
    }
}

/// Number of partial sums of a reduction: four AVX-512 registers' worth hides the latency of an addition.
pub(crate) const LANES: usize = 32;

/// The lanes of a reduction, added pairwise.
#[inline(always)]
pub(crate) fn add_lanes(mut acc: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            acc[i] += acc[i + half];
        }
        half /= 2;
    }
    acc[0]
}

/// [`dot`] for use inside another vectorised function.
#[inline(always)]
pub(crate) fn dot_body(xs: &[f32], ys: &[f32]) -> f32 {
    let n = xs.len().min(ys.len());
    let (xs, ys) = (&xs[..n], &ys[..n]);
    let mut acc = [0.0f32; LANES];
    let ((x_chunks, x_rest), (y_chunks, y_rest)) = (xs.as_chunks::<LANES>(), ys.as_chunks::<LANES>());
    for (x, y) in x_chunks.iter().zip(y_chunks) {
        for i in 0..LANES {
            acc[i] = x[i].mul_add(y[i], acc[i]);
        }
    }
    if !x_rest.is_empty() {
        let (x, y) = (padded(x_rest, 0.0), padded(y_rest, 0.0));
        for i in 0..LANES {
            acc[i] = x[i].mul_add(y[i], acc[i]);
        }
    }
    add_lanes(acc)
}

/// What is left of a slice, filled up to whole lanes. (Adding it to single lanes instead would index the
/// accumulators by a variable, and the compiler would keep them in memory.)
#[inline(always)]
fn padded(rest: &[f32], fill: f32) -> [f32; LANES] {
    let mut lanes = [fill; LANES];
    lanes[..rest.len()].copy_from_slice(rest);
    lanes
}

/// `e^x` within one unit in the last place, without a branch. `exp(-inf) = 0`, NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Beyond these the result is 0 or infinity anyway; written as comparisons so that NaN passes through.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts (Cody and Waite), the first short enough for an exact product.
    let r = n.mul_add(-0.693_145_75, x);
    let r = n.mul_add(-1.428_606_8e-6, r);
    let mut p = 1.378_059_4e-3f32;
    p = p.mul_add(r, 8.373_124_5e-3);
    p = p.mul_add(r, 4.166_953_6e-2);
    p = p.mul_add(r, 1.666_647_2e-1);
    p = p.mul_add(r, 4.999_998_5e-1);
    p = p.mul_add(r, 1.0);
    p = p.mul_add(r, 1.0);
    // 2^n in two factors: for subnormal results no single exponent would do.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) << 23) as u32)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Error function, within about one unit in the last place (N. Juffa's two polynomials).
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let (t, s) = (x.abs(), x * x);
    let r = (-1.728_534_7e-5f32).mul_add(t, 3.831_971_3e-4);
    let u = (-3.883_964_4e-3f32).mul_add(t, 2.425_462_2e-2);
    let r = r.mul_add(s, u);
    let r = r.mul_add(t, -1.067_778_8e-1);
    let r = r.mul_add(t, -0.634_846_7);
    let r = r.mul_add(t, -1.287_175_1e-1);
    let far = (1.0 - exp(r.mul_add(t, -t))).copysign(x);
    let near = (-5.967_617e-4f32).mul_add(s, 4.991_194_2e-3);
    let near = near.mul_add(s, -2.676_813_5e-2);
    let near = near.mul_add(s, 1.128_199_25e-1);
    let near = near.mul_add(s, -3.761_253_4e-1);
    let near = near.mul_add(s, 1.283_791_7e-1);
    let near = near.mul_add(x, x);
    if t > 0.927_734_4 { far } else { near }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance from `want` in units of the last place of an f32 near it.
    fn ulps(got: f32, want: f64) -> f64 {
        let exponent = want.abs().log2().floor().max(-126.0) as i32;
        (got as f64 - want).abs() / 2f64.powi(exponent - 23)
    }

    #[test]
    fn exp_is_within_one_and_a_half_units_of_f64_and_right_at_the_ends() {
        let (mut worst, mut at) = (0.0, 0.0);
        for i in 0..2_000_000 {
            let x = -103.0 + i as f32 * (191.7 / 2e6);
            let off = ulps(exp(x), (x as f64).exp());
            if off > worst {
                (worst, at) = (off, x);
            }
        }
        assert!(worst < 1.5, "exp({at}) is off by {worst} units");
        assert_eq!([exp(0.0), exp(f32::NEG_INFINITY), exp(-110.0), exp(100.0)], [1.0, 0.0, 0.0, f32::INFINITY]);
        assert_eq!([exp(f32::INFINITY), exp(f32::MIN)], [f32::INFINITY, 0.0]);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn erf_is_within_two_units_of_f64() {
        for i in -60_000..60_000 {
            let x = i as f32 * 1e-4 + 3e-5;
            let want = crate::gelu::naive::erf(x as f64);
            assert!(ulps(erf(x), want) < 2.0 || (erf(x) as f64 - want).abs() < 1e-9, "erf({x}) = {}, not {want}", erf(x));
        }
    }

    #[test]
    fn sigmoid_saturates_without_nan() {
        assert_eq!([sigmoid(f32::NEG_INFINITY), sigmoid(-200.0), sigmoid(0.0), sigmoid(200.0)], [0.0, 0.0, 0.5, 1.0]);
    }

    fn numbers(n: usize) -> Vec<f32> {
        let mut rng = sluice_testkit::Rng::new(n as u64 + 1);
        (0..n).map(|_| rng.normal()).collect()
    }

    fn close(what: &str, got: f32, want: f64) {
        assert!((got as f64 - want).abs() < 1e-5 * want.abs().max(1.0), "{what}: {got}, not {want}");
    }

    #[test]
    fn slices_of_any_length_agree_with_f64_loops() {
        for n in [0, 1, 31, 32, 33, 63, 100, 1000] {
            let (x, y) = (numbers(n), numbers(n + 7));
            let top = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&x), top, "{n}");
            assert_eq!(argmax(&x).map(|(i, value)| (x[i], value)), (n > 0).then_some((top, top)));
            let exps: f64 = x.iter().map(|&x| (x as f64 - 0.5).exp()).sum();
            close("sum", sum(&x), x.iter().map(|&x| x as f64).sum());
            close("dot", dot(&x, &y), x.iter().zip(&y).map(|(&x, &y)| x as f64 * y as f64).sum());
            close("sum_exp", sum_exp(&x, 0.5), exps);
            let mut in_place = x.clone();
            close("exp_in_place", exp_in_place(&mut in_place, 0.5), exps);
            in_place.iter().zip(&x).for_each(|(&e, &x)| close("exp_in_place", e, (x as f64 - 0.5).exp()));
            let mut z = y[..n].to_vec();
            axpy(-2.0, &x, &mut z);
            scale(&mut z, 3.0);
            add_assign(&mut z, &y);
            for i in 0..n {
                close("exp", exp(x[i]), (x[i] as f64).exp());
                close("axpy, scale, add", z[i], 4.0 * y[i] as f64 - 6.0 * x[i] as f64);
            }
        }
    }

    #[test]
    fn argmax_takes_the_first_of_equals_and_skips_nan() {
        assert_eq!(argmax(&[1.0, 3.0, f32::NAN, 3.0]), Some((1, 3.0)));
        assert_eq!(argmax(&[f32::NAN]), None);
        assert_eq!(argmax(&[f32::NEG_INFINITY; 2]), Some((0, f32::NEG_INFINITY)));
    }

    #[test]
    fn every_instruction_set_rounds_alike() {
        // The body compiled for the baseline against whatever this machine chooses.
        let (x, y) = (numbers(1000), numbers(1000));
        assert_eq!(dot(&x, &y), dot_body(&x, &y));
    }
}
