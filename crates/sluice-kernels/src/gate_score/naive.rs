//! The specification, in f64.

/// Scores `[rows, Gs]` of `x [rows, M]`; row `i` is at `positions[i % T]`.
pub(super) fn fwd(x: &[f32], weight: &[f32], bias: &[f32], recency: &[f32], positions: &[u32], eps: f32) -> Vec<f64> {
    let gs = bias.len();
    let m = weight.len() / gs;
    let mut scores = vec![];
    for (i, row) in x.chunks_exact(m).enumerate() {
        let mean_square = row.iter().map(|&v| v as f64 * v as f64).sum::<f64>() / m as f64;
        let rms = (mean_square + eps as f64).sqrt();
        let position = positions[i % positions.len()] as f64;
        for g in 0..gs {
            let dot: f64 = row.iter().zip(&weight[g * m..(g + 1) * m]).map(|(&v, &a)| v as f64 / rms * a as f64).sum();
            scores.push(dot + bias[g] as f64 + recency[g] as f64 * position / 1024.0);
        }
    }
    scores
}
