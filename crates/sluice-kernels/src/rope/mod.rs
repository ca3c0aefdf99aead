//! Rotary positions: pair `i` of a head at position `p` is turned by the angle `p * inv_freq[i]`.
//!
//! Knows nothing about contexts or scaling rules: the frequencies arrive ready. Angles are computed in f64,
//! since at position 10^6 an f32 angle is off by up to 0.03.

pub(crate) mod cases;
mod cuda;
pub mod naive;
#[cfg(test)]
mod tests;

use sluice_tensor::Tensor;

use crate::row_chunks::{for_each_chunk, rows_per_chunk};
use crate::vector_math::vectorised;

/// Which two elements of a head form pair `i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Elements `2i` and `2i + 1` (`llama` GGUF files, the original RoFormer).
    Interleaved,
    /// Elements `i` and `i + D/2` (Hugging Face, `qwen2` GGUF files).
    HalfSplit,
}

/// `x [B, T, H, D]` turned forwards; `positions` has `T` entries and `inv_freq` has `D / 2`.
#[track_caller]
pub fn fwd(x: &Tensor, positions: &[u32], inv_freq: &[f32], style: RopeStyle) -> Tensor {
    rotate(x, positions, inv_freq, style, 1.0)
}

/// The gradient is turned backwards.
#[track_caller]
pub fn bwd(dy: &Tensor, positions: &[u32], inv_freq: &[f32], style: RopeStyle) -> Tensor {
    rotate(dy, positions, inv_freq, style, -1.0)
}

/// Cosines and sines `[D / 2]` of one position, for [`turn_heads`].
#[track_caller]
pub fn position_angles(position: u32, inv_freq: &[f32], cos: &mut [f32], sin: &mut [f32]) {
    assert!(cos.len() == inv_freq.len() && sin.len() == inv_freq.len(), "rope angles of {} frequencies", inv_freq.len());
    for (i, &f) in inv_freq.iter().enumerate() {
        let (s, c) = (position as f64 * f as f64).sin_cos();
        (cos[i], sin[i]) = (c as f32, s as f32);
    }
}

/// Turn the heads `x [n, D]` of one token in place, half-split pairs.
#[track_caller]
pub fn turn_heads(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    assert!(cos.len() == sin.len() && x.len().is_multiple_of(2 * cos.len()), "rope of {} numbers by {} angles", x.len(), cos.len());
    turn_half_split(x, cos, sin);
}

#[track_caller]
fn rotate(x: &Tensor, positions: &[u32], inv_freq: &[f32], style: RopeStyle, direction: f32) -> Tensor {
    let [_, n_queries, n_heads, head_dim] = x.dims();
    assert!(
        positions.len() == n_queries && inv_freq.len() * 2 == head_dim,
        "rope of x {:?} with {} positions and {} frequencies",
        x.shape(),
        positions.len(),
        inv_freq.len()
    );
    if let Some(gpu) = x.gpu() {
        return cuda::rotate(gpu, x, positions, inv_freq, style, direction);
    }
    let xs = x.f32();
    let token_len = n_heads * head_dim;
    let (cos, sin) = angles(positions, inv_freq, direction);
    let mut y = vec![0.0; xs.len()];
    let tokens = rows_per_chunk(token_len);
    for_each_chunk(&mut y, tokens * token_len.max(1), |chunk, y| {
        for (i, y) in y.chunks_exact_mut(token_len).enumerate() {
            let token = chunk * tokens + i;
            let pairs = (token % n_queries) * inv_freq.len();
            let (cos, sin) = (&cos[pairs..pairs + inv_freq.len()], &sin[pairs..pairs + inv_freq.len()]);
            let x = &xs[token * token_len..(token + 1) * token_len];
            match style {
                RopeStyle::Interleaved => rotate_interleaved(x, cos, sin, y),
                RopeStyle::HalfSplit => rotate_half_split(x, cos, sin, y),
            }
        }
    });
    Tensor::from_vec(y, x.shape())
}

/// Cosines and sines `[T, D / 2]`.
///
/// A position is `64 a + b`: the sine of a sum from two short tables costs four products instead of a
/// sine and a cosine per element.
fn angles(positions: &[u32], inv_freq: &[f32], direction: f32) -> (Vec<f32>, Vec<f32>) {
    const STEP: u32 = 64;
    let n = inv_freq.len();
    let turn = |position: u32| move |&f: &f32| (position as f64 * f as f64).sin_cos();
    let n_low = positions.iter().map(|p| p % STEP + 1).max().unwrap_or(0);
    let low: Vec<(f64, f64)> = (0..n_low).flat_map(|b| inv_freq.iter().map(turn(b))).collect();
    let (mut cos, mut sin) = (vec![0.0; positions.len() * n], vec![0.0; positions.len() * n]);
    let (mut at, mut high) = (None, Vec::new());
    for (t, &position) in positions.iter().enumerate() {
        let a = position / STEP;
        if at != Some(a) {
            high = inv_freq.iter().map(turn(a * STEP)).collect();
            at = Some(a);
        }
        let low = &low[(position % STEP) as usize * n..][..n];
        for (i, (&(sin_a, cos_a), &(sin_b, cos_b))) in high.iter().zip(low).enumerate() {
            cos[t * n + i] = (cos_a * cos_b - sin_a * sin_b) as f32;
            sin[t * n + i] = (sin_a * cos_b + cos_a * sin_b) as f32 * direction;
        }
    }
    (cos, sin)
}

vectorised! {
    fn rotate_half_split(x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
        let n = cos.len();
        let sin = &sin[..n];
        for (x, y) in x.chunks_exact(2 * n).zip(y.chunks_exact_mut(2 * n)) {
            let ((x0, x1), (y0, y1)) = (x.split_at(n), y.split_at_mut(n));
            let (x1, y1) = (&x1[..n], &mut y1[..n]);
            for i in 0..n {
                y0[i] = x0[i] * cos[i] - x1[i] * sin[i];
                y1[i] = x1[i] * cos[i] + x0[i] * sin[i];
            }
        }
    }
}

vectorised! {
    fn turn_half_split(x: &mut [f32], cos: &[f32], sin: &[f32]) {
        let n = cos.len();
        let sin = &sin[..n];
        for x in x.chunks_exact_mut(2 * n) {
            let (x0, x1) = x.split_at_mut(n);
            let x1 = &mut x1[..n];
            for i in 0..n {
                (x0[i], x1[i]) = (x0[i] * cos[i] - x1[i] * sin[i], x1[i] * cos[i] + x0[i] * sin[i]);
            }
        }
    }
}

vectorised! {
    fn rotate_interleaved(x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
        let n = cos.len();
        for (x, y) in x.chunks_exact(2 * n).zip(y.chunks_exact_mut(2 * n)) {
            let (x, y) = (x.as_chunks::<2>().0, y.as_chunks_mut::<2>().0);
            for ((x, y), (cos, sin)) in x.iter().zip(y).zip(cos.iter().zip(sin)) {
                *y = [x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin];
            }
        }
    }
}
