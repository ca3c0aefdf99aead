//! The specification: the update written out for one element in f64, in the order of torch.

use super::AdamW;

/// New `(param, m, v)`.
pub fn step(param: f64, grad: f64, m: f64, v: f64, grad_scale: f64, a: &AdamW) -> (f64, f64, f64) {
    let (lr, beta1, beta2, t) = (a.lr as f64, a.beta1 as f64, a.beta2 as f64, a.step as f64);
    let grad = grad * grad_scale;
    let param = param * (1.0 - lr * a.weight_decay as f64);
    let m = beta1 * m + (1.0 - beta1) * grad;
    let v = beta2 * v + (1.0 - beta2) * grad * grad;
    let m_hat = m / (1.0 - beta1.powf(t));
    let v_hat = v / (1.0 - beta2.powf(t));
    (param - lr * m_hat / (v_hat.sqrt() + a.eps as f64), m, v)
}
