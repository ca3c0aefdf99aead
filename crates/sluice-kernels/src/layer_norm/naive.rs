//! The specification, row by row in f64.

use sluice_tensor::Tensor;

/// `(y, mean, inv_std)`.
pub fn fwd(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let m = x.last_dim();
    let (mut y, mut means, mut inv_stds) = (Vec::new(), Vec::new(), Vec::new());
    for row in x.f32().chunks(m.max(1)) {
        let mean = row.iter().map(|&x| x as f64).sum::<f64>() / m as f64;
        let var = row.iter().map(|&x| (x as f64 - mean).powi(2)).sum::<f64>() / m as f64;
        let inv = 1.0 / (var + eps as f64).sqrt();
        y.extend(row.iter().enumerate().map(|(p, &x)| (x as f64 - mean) * inv * weight.f32()[p] as f64 + bias.f32()[p] as f64));
        means.push(mean);
        inv_stds.push(inv);
    }
    (y, means, inv_stds)
}

/// `(dx, dweight, dbias)` from the derivative of every output by every input of the row.
pub fn bwd(dy: &Tensor, x: &Tensor, weight: &Tensor, eps: f32) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let m = x.last_dim();
    let (_, mean, inv_std) = fwd(x, weight, weight, eps);
    let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; m], vec![0.0; m]);
    for i in 0..mean.len() {
        let n = |p: usize| (x.f32()[i * m + p] as f64 - mean[i]) * inv_std[i];
        for p in 0..m {
            dw[p] += dy.f32()[i * m + p] as f64 * n(p);
            db[p] += dy.f32()[i * m + p] as f64;
            for q in 0..m {
                // d y_q / d x_p = w_q inv (delta_pq - 1/m - n_p n_q / m)
                let direct = if p == q { 1.0 } else { 0.0 };
                let g = dy.f32()[i * m + q] as f64 * weight.f32()[q] as f64;
                dx[i * m + p] += g * inv_std[i] * (direct - 1.0 / m as f64 - n(p) * n(q) / m as f64);
            }
        }
    }
    (dx, dw, db)
}
