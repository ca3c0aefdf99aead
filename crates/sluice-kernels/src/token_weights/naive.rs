//! The definition, row by row in f64.

use super::Terms;

/// Weights of one document from `(nll, probability, nll without far context, draw)` of its rows.
pub fn of_document(rows: &[(f64, f64, f64, f64)], terms: &Terms) -> Vec<f64> {
    let weights: Vec<f64> = rows
        .iter()
        .map(|&(nll, probability, local, draw)| {
            let counts = probability > terms.sure as f64 || draw < terms.share as f64;
            let times = if local - nll > terms.far_gain as f64 { terms.far_weight as f64 } else { 1.0 };
            if counts { times } else { 0.0 }
        })
        .collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| if sum > 0.0 { weight / sum } else { 0.0 }).collect()
}
