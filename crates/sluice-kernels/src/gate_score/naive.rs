//! The specification, in f64.

/// Scores `[rows, Gs]` of `x [rows, M]`; row `i` is at `positions[i % T]`.
pub fn fwd(x: &[f32], weight: &[f32], bias: &[f32], recency: &[f32], positions: &[u32], eps: f32) -> Vec<f64> {
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

/// `(dweight [Gs, M], dbias, drecency, dx [rows, M])` from the derivative of every score by everything.
pub fn bwd(dscores: &[f32], x: &[f32], weight: &[f32], gs: usize, positions: &[u32], eps: f32) -> (Vec<f64>, Vec<f64>, Vec<f64>, Vec<f64>) {
    let m = weight.len() / gs;
    let (mut dweight, mut dbias, mut drecency, mut dx) = (vec![0.0; gs * m], vec![0.0; gs], vec![0.0; gs], vec![0.0; x.len()]);
    for (i, row) in x.chunks_exact(m).enumerate() {
        let mean_square = row.iter().map(|&v| v as f64 * v as f64).sum::<f64>() / m as f64;
        let inv = 1.0 / (mean_square + eps as f64).sqrt();
        for g in 0..gs {
            let (d, a) = (dscores[i * gs + g] as f64, &weight[g * m..(g + 1) * m]);
            let dot: f64 = row.iter().zip(a).map(|(&v, &a)| v as f64 * a as f64).sum();
            dbias[g] += d;
            drecency[g] += d * positions[i % positions.len()] as f64 / 1024.0;
            for p in 0..m {
                dweight[g * m + p] += d * row[p] as f64 * inv;
                dx[i * m + p] += d * (inv * a[p] as f64 - row[p] as f64 * inv.powi(3) / m as f64 * dot);
            }
        }
    }
    (dweight, dbias, drecency, dx)
}
