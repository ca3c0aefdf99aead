//! Block formats of GGUF and their values in f32, bit for bit as the format's reference implementation
//! computes them (golden/gguf_blocks.py). Knows nothing about files.
//!
//! A block is `block_len` consecutive elements of a row with its own scale. Names follow ggml:
//! `d` scale, `m` minimum, `qs` low bits, `qh` high bits.

use half::{bf16, f16};

/// How the elements of a stored tensor are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(non_camel_case_types, reason = "the format's own names: Q4_K, not Q4K")]
pub(super) enum BlockFormat {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

use BlockFormat::*;

/// ggml's type numbers; those without a format can be named in an error, not read.
const GGML_TYPES: [(u32, &str, Option<BlockFormat>); 33] = [
    (0, "F32", Some(F32)),
    (1, "F16", Some(F16)),
    (2, "Q4_0", Some(Q4_0)),
    (3, "Q4_1", Some(Q4_1)),
    (6, "Q5_0", Some(Q5_0)),
    (7, "Q5_1", Some(Q5_1)),
    (8, "Q8_0", Some(Q8_0)),
    (9, "Q8_1", None),
    (10, "Q2_K", None),
    (11, "Q3_K", None),
    (12, "Q4_K", Some(Q4_K)),
    (13, "Q5_K", Some(Q5_K)),
    (14, "Q6_K", Some(Q6_K)),
    (15, "Q8_K", None),
    (16, "IQ2_XXS", None),
    (17, "IQ2_XS", None),
    (18, "IQ3_XXS", None),
    (19, "IQ1_S", None),
    (20, "IQ4_NL", None),
    (21, "IQ3_S", None),
    (22, "IQ2_S", None),
    (23, "IQ4_XS", None),
    (24, "I8", None),
    (25, "I16", None),
    (26, "I32", None),
    (27, "I64", None),
    (28, "F64", None),
    (29, "IQ1_M", None),
    (30, "BF16", Some(Bf16)),
    (34, "TQ1_0", None),
    (35, "TQ2_0", None),
    (39, "MXFP4", None),
    (40, "NVFP4", None),
];

impl BlockFormat {
    /// The format of a ggml type number, or that type's name for the message.
    pub(super) fn from_ggml(id: u32) -> Result<Self, String> {
        match GGML_TYPES.iter().find(|t| t.0 == id) {
            Some((_, _, Some(format))) => Ok(*format),
            Some((_, name, None)) => Err(format!("quantisation {name} (type {id})")),
            None => Err(format!("unknown tensor type {id}")),
        }
    }

    /// Names of the formats that can be read.
    pub(super) fn readable() -> String {
        GGML_TYPES.iter().filter(|t| t.2.is_some()).map(|t| t.1).collect::<Vec<_>>().join(", ")
    }

    /// Elements of one block.
    pub(super) fn block_len(self) -> usize {
        match self {
            F32 | F16 | Bf16 => 1,
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 => 32,
            Q4_K | Q5_K | Q6_K => 256,
        }
    }

    /// Bytes of one block.
    pub(super) fn block_bytes(self) -> usize {
        match self {
            F32 => 4,
            F16 | Bf16 => 2,
            Q4_0 => 2 + 16,
            Q4_1 => 4 + 16,
            Q5_0 => 2 + 4 + 16,
            Q5_1 => 4 + 4 + 16,
            Q8_0 => 2 + 32,
            Q4_K => 4 + 12 + 128,
            Q5_K => 4 + 12 + 32 + 128,
            Q6_K => 128 + 64 + 16 + 2,
        }
    }
}

/// Decode whole blocks; panics unless `out` holds exactly their elements.
#[track_caller]
pub(super) fn dequantise(format: BlockFormat, bytes: &[u8], out: &mut [f32]) {
    let n_blocks = out.len() / format.block_len();
    assert!(
        out.len().is_multiple_of(format.block_len()) && bytes.len() == n_blocks * format.block_bytes(),
        "{} bytes of {format:?} for {} elements",
        bytes.len(),
        out.len()
    );
    match format {
        F32 => each_block(bytes, out, |b: &[u8; 4], y: &mut [f32; 1]| y[0] = f32::from_le_bytes(*b)),
        F16 => each_block(bytes, out, |b: &[u8; 2], y: &mut [f32; 1]| y[0] = f16::from_le_bytes(*b).to_f32()),
        Bf16 => each_block(bytes, out, |b: &[u8; 2], y: &mut [f32; 1]| y[0] = bf16::from_le_bytes(*b).to_f32()),
        Q4_0 => each_block(bytes, out, q4_0),
        Q4_1 => each_block(bytes, out, q4_1),
        Q5_0 => each_block(bytes, out, q5_0),
        Q5_1 => each_block(bytes, out, q5_1),
        Q8_0 => each_block(bytes, out, q8_0),
        Q4_K => each_block(bytes, out, q4_k),
        Q5_K => each_block(bytes, out, q5_k),
        Q6_K => each_block(bytes, out, q6_k),
    }
}

/// Fixed-size arrays let the compiler drop every bounds check and vectorise the decoders.
#[inline(always)]
fn each_block<const B: usize, const N: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn(&[u8; B], &mut [f32; N])) {
    for (block, y) in bytes.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        decode(block, y);
    }
}

#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[inline(always)]
fn q4_0(block: &[u8; 18], y: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for j in 0..16 {
        let q = block[2 + j];
        y[j] = d * ((q & 15) as i32 - 8) as f32;
        y[j + 16] = d * ((q >> 4) as i32 - 8) as f32;
    }
}

#[inline(always)]
fn q4_1(block: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for j in 0..16 {
        let q = block[4 + j];
        y[j] = d * (q & 15) as f32 + m;
        y[j + 16] = d * (q >> 4) as f32 + m;
    }
}

#[inline(always)]
fn q5_0(block: &[u8; 22], y: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let qh = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for j in 0..16 {
        let q = block[6 + j] as u32;
        y[j] = d * (((q & 15) | (qh >> j & 1) << 4) as i32 - 16) as f32;
        y[j + 16] = d * ((q >> 4 | (qh >> (j + 16) & 1) << 4) as i32 - 16) as f32;
    }
}

#[inline(always)]
fn q5_1(block: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let qh = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for j in 0..16 {
        let q = block[8 + j] as u32;
        y[j] = d * ((q & 15) | (qh >> j & 1) << 4) as f32 + m;
        y[j + 16] = d * (q >> 4 | (qh >> (j + 16) & 1) << 4) as f32 + m;
    }
}

#[inline(always)]
fn q8_0(block: &[u8; 34], y: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for j in 0..32 {
        y[j] = d * (block[2 + j] as i8) as f32;
    }
}

/// Scale and minimum of the eight sub-blocks of a K block: 6 bits each, packed into 12 bytes so that
/// the last four borrow the top two bits of the first eight bytes.
#[inline(always)]
fn k_scales(packed: &[u8; 12]) -> [(u8, u8); 8] {
    std::array::from_fn(|j| {
        if j < 4 {
            (packed[j] & 63, packed[j + 4] & 63)
        } else {
            ((packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4, packed[j + 4] >> 4 | (packed[j] >> 6) << 4)
        }
    })
}

#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("a part lies inside its block")
}

#[inline(always)]
fn q4_k(block: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let scales = k_scales(part(block, 4));
    let qs: &[u8; 128] = part(block, 16);
    for (s, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        // Two sub-blocks share 32 bytes: low nibbles, then high ones.
        let (scale, min) = (d * scales[s].0 as f32, dmin * scales[s].1 as f32);
        let shift = (s % 2) * 4;
        for j in 0..32 {
            y[j] = scale * (qs[s / 2 * 32 + j] >> shift & 15) as f32 - min;
        }
    }
}

#[inline(always)]
fn q5_k(block: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let scales = k_scales(part(block, 4));
    let qh: &[u8; 32] = part(block, 16);
    let qs: &[u8; 128] = part(block, 48);
    for (s, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = (d * scales[s].0 as f32, dmin * scales[s].1 as f32);
        let shift = (s % 2) * 4;
        for j in 0..32 {
            // Bit s of qh[j] is the fifth bit of element j of sub-block s.
            let q = (qs[s / 2 * 32 + j] >> shift & 15) | (qh[j] >> s & 1) << 4;
            y[j] = scale * q as f32 - min;
        }
    }
}

#[inline(always)]
fn q6_k(block: &[u8; 210], y: &mut [f32; 256]) {
    let ql: &[u8; 128] = part(block, 0);
    let qh: &[u8; 64] = part(block, 128);
    let scales: &[u8; 16] = part(block, 192);
    let d = half_at(block, 208);
    for (s, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // Sub-block s: half of the block, quarter of that half, first or second 16 of that quarter.
        let (half, quarter, at) = (s / 8, s % 8 / 2, s % 2 * 16);
        let scale = d * (scales[s] as i8) as f32;
        let low = half * 64 + quarter % 2 * 32 + at;
        let high = half * 32 + at;
        for j in 0..16 {
            let q = (ql[low + j] >> (quarter / 2 * 4) & 15) | (qh[high + j] >> (quarter * 2) & 3) << 4;
            y[j] = scale * (q as i32 - 32) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random blocks and their reference values, written by golden/gguf_blocks.py.
    const GOLDEN: &[u8] = include_bytes!("../../../../golden/gguf_blocks.bin");

    fn take<'a>(rest: &mut &'a [u8], n: usize) -> &'a [u8] {
        let (head, tail) = rest.split_at(n);
        *rest = tail;
        head
    }

    #[test]
    fn every_format_equals_the_reference_bit_for_bit() {
        let mut rest = GOLDEN;
        let mut seen = Vec::new();
        while !rest.is_empty() {
            let head = take(&mut rest, 16).as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect::<Vec<_>>();
            let format = BlockFormat::from_ggml(head[0]).unwrap();
            let (n_blocks, block_len, block_bytes) = (head[1] as usize, head[2] as usize, head[3] as usize);
            assert_eq!((format.block_len(), format.block_bytes()), (block_len, block_bytes), "{format:?}");
            let blocks = take(&mut rest, n_blocks * block_bytes);
            let want = take(&mut rest, n_blocks * block_len * 4).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
            let mut got = vec![f32::NAN; n_blocks * block_len];
            dequantise(format, blocks, &mut got);
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                assert_eq!(got.to_bits(), want.to_bits(), "{format:?}: element {i} is {got}, the reference says {want}");
            }
            seen.push(head[0]);
        }
        let readable: Vec<u32> = GGML_TYPES.iter().filter(|t| t.2.is_some()).map(|t| t.0).collect();
        seen.sort_unstable();
        assert_eq!(seen, readable, "the golden file covers every readable format");
    }

    #[test]
    fn formats_that_cannot_be_read_are_named() {
        assert!(BlockFormat::from_ggml(10).unwrap_err().contains("Q2_K"));
        assert!(BlockFormat::from_ggml(777).unwrap_err().contains("777"));
    }
}
