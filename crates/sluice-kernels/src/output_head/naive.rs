//! The specification: whole logit rows in f64, one loss and one gradient at a time.

use sluice_tensor::Tensor;

use super::DistillTerms;
use crate::linear;

/// Logits of every row.
pub fn logits(h: &Tensor, w: &Tensor) -> Vec<Vec<f64>> {
    let vocab = w.shape()[0];
    linear::naive::fwd(h, w, None).chunks(vocab).map(<[f64]>::to_vec).collect()
}

/// `log softmax(z / temperature)`.
pub fn log_softmax(z: &[f64], temperature: f64) -> Vec<f64> {
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = z.iter().map(|z| ((z - max) / temperature).exp()).sum::<f64>().ln();
    z.iter().map(|z| (z - max) / temperature - log_sum).collect()
}

/// Negative log-likelihood of `target` and its gradient by the logits.
pub fn cross_entropy(z: &[f64], target: usize) -> (f64, Vec<f64>) {
    let log_p = log_softmax(z, 1.0);
    let gradient = log_p.iter().enumerate().map(|(j, l)| l.exp() - if j == target { 1.0 } else { 0.0 }).collect();
    (-log_p[target], gradient)
}

/// `temperature^2 KL(teacher || student)` and its gradient by the student's logits.
pub fn kl(z_s: &[f64], z_t: &[f64], temperature: f64) -> (f64, Vec<f64>) {
    let (log_s, log_t) = (log_softmax(z_s, temperature), log_softmax(z_t, temperature));
    let kl: f64 = log_t.iter().zip(&log_s).map(|(t, s)| t.exp() * (t - s)).sum();
    let gradient = log_t.iter().zip(&log_s).map(|(t, s)| temperature * (s.exp() - t.exp())).collect();
    (temperature * temperature * kl, gradient)
}

/// Decision-boundary loss and its gradient by the student's logits.
pub fn boundary(z_s: &[f64], z_t: &[f64], terms: &DistillTerms) -> (f64, Vec<f64>) {
    let mut gradient = vec![0.0; z_s.len()];
    let best_but = |z: &[f64], but: Option<usize>| {
        (0..z.len()).filter(|&i| Some(i) != but).fold(None, |best: Option<usize>, i| match best {
            Some(b) if z[b] >= z[i] => Some(b),
            _ => Some(i),
        })
    };
    let a = best_but(z_t, None).expect("a vocabulary is not empty");
    let (Some(c), Some(second)) = (best_but(z_s, Some(a)), best_but(z_t, Some(a))) else { return (0.0, gradient) };
    let lead = z_t[a] - z_t[second];
    let omega = 1.0 / (1.0 + (-(terms.boundary_delta as f64 - lead) / terms.boundary_width as f64).exp());
    let missing = ((z_t[a] - z_t[c]).min(terms.margin_cap as f64) - (z_s[a] - z_s[c])).max(0.0);
    gradient[a] = -2.0 * omega * missing;
    gradient[c] = 2.0 * omega * missing;
    (omega * missing * missing, gradient)
}
