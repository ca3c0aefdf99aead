//! Dev-dependency of every crate: seeded numbers, tolerances, finite differences and the shape of a small model.
//! Deterministic: the same seed gives the same numbers on every machine.

use sluice_spec::{Architecture, ModelConfig};
use sluice_tensor::Tensor;

/// A decoder of two layers, four heads on two KV heads, with the biases and norms of its architecture. A test names what it needs otherwise.
pub fn small_model(architecture: Architecture) -> ModelConfig {
    ModelConfig {
        architecture,
        n_layers: 2,
        d_model: 32,
        d_ff: 48,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 8,
        vocab_size: 64,
        max_seq_len: 512,
        norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: None,
        tie_embeddings: true,
        qkv_bias: architecture == Architecture::Qwen2,
        qk_norm: architecture == Architecture::Qwen3,
    }
}

/// A small seeded generator (SplitMix64); tests need reproducible numbers, not good ones.
pub struct Rng(u64);

impl Rng {
    /// A generator for this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 uniform bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f32 {
        let u = 1.0 - self.uniform();
        (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * self.uniform()).cos()
    }

    /// A tensor of standard normals.
    pub fn normal_tensor(&mut self, shape: impl Into<Vec<usize>>) -> Tensor {
        let shape = shape.into();
        let n = shape.iter().product();
        Tensor::from_vec((0..n).map(|_| self.normal()).collect(), shape)
    }
}

/// Largest absolute difference; NaN anywhere counts as infinite.
pub fn max_abs_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "comparing {} with {} elements", a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(x, y)| if x == y { 0.0 } else { (x - y).abs() })
        .fold(0.0, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) })
}

/// Panic unless every element of `got` is within `tolerance * max(1, |want|)` of `want`.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}: {} elements, expected {}", got.len(), want.len());
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let ok = g == w || (g - w).abs() <= tolerance * w.abs().max(1.0);
        assert!(ok, "{what}: element {i} is {g}, expected {w} within {tolerance}");
    }
}

/// Check an analytic gradient against central differences of `loss` at `n_probes` seeded positions of `x`.
///
/// `loss` must compute in f64 from f32 inputs or be smooth enough for `step`; the tolerance is relative
/// to the largest gradient seen, since single entries may be tiny.
#[track_caller]
pub fn check_gradient(
    what: &str,
    x: &Tensor,
    grad: &Tensor,
    step: f32,
    tolerance: f32,
    n_probes: usize,
    mut loss: impl FnMut(&Tensor) -> f64,
) {
    assert_eq!(x.shape(), grad.shape(), "{what}: gradient has another shape");
    let scale = grad.f32().iter().fold(1e-3f32, |m, g| m.max(g.abs()));
    let mut rng = Rng::new(0xD1FF ^ x.len() as u64);
    let probes: Vec<usize> = if x.len() <= n_probes { (0..x.len()).collect() } else { (0..n_probes).map(|_| rng.below(x.len())).collect() };
    for i in probes {
        let mut at = |delta: f32| {
            let mut moved = x.clone();
            moved.f32_mut()[i] += delta;
            // The step that f32 really took, not the one asked for.
            let taken = moved.f32()[i] as f64 - x.f32()[i] as f64;
            (loss(&moved), taken)
        };
        let ((up, a), (down, b)) = (at(step), at(-step));
        let numeric = ((up - down) / (a - b)) as f32;
        let analytic = grad.f32()[i];
        assert!(
            (numeric - analytic).abs() <= tolerance * scale,
            "{what}: gradient at {i} is {analytic}, finite differences give {numeric} (tolerance {tolerance} x {scale})"
        );
    }
}

/// Seeded, non-uniform weights for turning a tensor-valued op into a scalar loss.
pub fn probe_weights(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..len).map(|_| rng.normal()).collect()
}
