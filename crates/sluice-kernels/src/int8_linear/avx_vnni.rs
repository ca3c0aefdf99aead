//! Inner loop for AVX-VNNI, processors with `vpdpwssd` but without AVX-512: that of AVX2 with one instruction for a product and its sum.

use std::arch::x86_64::*;

super::avx2::eight_rows_a_vector!("avx2,avxvnni,fma,f16c");

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn multiply_add(mut sums: __m256i, w: [__m256i; 2], a: [__m256i; 2]) -> __m256i {
    for (w, a) in w.into_iter().zip(a) {
        // What `_mm256_dpwssd_avx_epi32` is taken apart from, see avx512_vnni.rs.
        // SAFETY: it only computes.
        unsafe {
            std::arch::asm!("{{vex}} vpdpwssd {0}, {1}, {2}", inout(ymm_reg) sums, in(ymm_reg) w, in(ymm_reg) a, options(pure, nomem, nostack, preserves_flags));
        }
    }
    sums
}
