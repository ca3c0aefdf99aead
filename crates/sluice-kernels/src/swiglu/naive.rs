//! The specification, one element at a time in f64.

/// `silu(gate) * up`.
pub fn fwd(gate: &[f32], up: &[f32]) -> Vec<f64> {
    gate.iter().zip(up).map(|(&g, &u)| g as f64 * sigmoid(g as f64) * u as f64).collect()
}

/// `(dgate, dup)`.
pub fn bwd(dy: &[f32], gate: &[f32], up: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let element = |i: usize| {
        let (d, g, u) = (dy[i] as f64, gate[i] as f64, up[i] as f64);
        let s = sigmoid(g);
        (d * u * (s + g * s * (1.0 - s)), d * g * s)
    };
    (0..dy.len()).map(element).unzip()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
