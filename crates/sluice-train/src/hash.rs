//! Seeded hashing of indices: random choices that depend on what they are for, not on how often a generator ran,
//! so that a resumed run and a run on another number of threads choose alike.

/// Hash of two numbers (SplitMix64 finaliser).
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z =
        a.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(b.wrapping_mul(0xD1B5_4A32_D192_ED03)).wrapping_add(0x632B_E59B_D9B4_E019);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Uniform in [0, 1) from a hash.
pub(crate) fn uniform(hash: u64) -> f32 {
    (hash >> 40) as f32 / (1u64 << 24) as f32
}
