//! The specification, row by row in f64.

use sluice_tensor::Tensor;

/// `(y, inv_rms)`.
pub fn fwd(x: &Tensor, weight: Option<&Tensor>, eps: f32) -> (Vec<f64>, Vec<f64>) {
    let m = x.last_dim();
    let (mut y, mut inv_rms) = (Vec::new(), Vec::new());
    for row in x.f32().chunks(m.max(1)) {
        let mean_square = row.iter().map(|&x| x as f64 * x as f64).sum::<f64>() / m as f64;
        let inv = 1.0 / (mean_square + eps as f64).sqrt();
        inv_rms.push(inv);
        y.extend(row.iter().enumerate().map(|(p, &x)| x as f64 * inv * weight.map_or(1.0, |w| w.f32()[p] as f64)));
    }
    (y, inv_rms)
}

/// `(dx, dweight)` from the derivative of every output by every input of the row.
pub fn bwd(dy: &Tensor, x: &Tensor, weight: Option<&Tensor>, eps: f32) -> (Vec<f64>, Vec<f64>) {
    let m = x.last_dim();
    let (_, inv_rms) = fwd(x, weight, eps);
    let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; m]);
    for (i, &inv) in inv_rms.iter().enumerate() {
        let (x, dy) = (&x.f32()[i * m..(i + 1) * m], &dy.f32()[i * m..(i + 1) * m]);
        for p in 0..m {
            dw[p] += dy[p] as f64 * x[p] as f64 * inv;
            for q in 0..m {
                // d y_q / d x_p = w_q (delta_pq inv - x_q x_p inv^3 / m)
                let direct = if p == q { inv } else { 0.0 };
                let through_norm = x[q] as f64 * x[p] as f64 * inv.powi(3) / m as f64;
                dx[i * m + p] += dy[q] as f64 * weight.map_or(1.0, |w| w.f32()[q] as f64) * (direct - through_norm);
            }
        }
    }
    (dx, dw)
}
