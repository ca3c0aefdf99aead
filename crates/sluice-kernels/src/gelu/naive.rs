//! The specification in f64, with erf from its series and its continued fraction.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// `gelu(x)`.
pub fn fwd(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x as f64 * cdf(x as f64)).collect()
}

/// `dy gelu'(x)`.
pub fn bwd(dy: &[f32], x: &[f32]) -> Vec<f64> {
    let derivative = |x: f64| cdf(x) + x * (-0.5 * x * x).exp() / (2.0 * PI).sqrt();
    dy.iter().zip(x).map(|(&d, &x)| d as f64 * derivative(x as f64)).collect()
}

fn cdf(x: f64) -> f64 {
    0.5 * erfc(-x * FRAC_1_SQRT_2)
}

/// Error function.
pub fn erf(x: f64) -> f64 {
    1.0 - erfc(x)
}

fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    if x < 2.5 {
        // erf x = 2/sqrt(pi) sum (-1)^n x^(2n+1) / (n! (2n+1))
        let (mut power, mut sum) = (x, 0.0);
        for n in 0..80 {
            sum += power / (2 * n + 1) as f64;
            power *= -x * x / (n + 1) as f64;
        }
        return 1.0 - 2.0 / PI.sqrt() * sum;
    }
    // erfc x = exp(-x^2)/sqrt(pi) / (x + (1/2)/(x + (2/2)/(x + (3/2)/(x + ..))))
    let mut tail = x;
    for n in (1..120).rev() {
        tail = x + 0.5 * n as f64 / tail;
    }
    (-x * x).exp() / PI.sqrt() / tail
}
