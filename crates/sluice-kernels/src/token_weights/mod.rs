//! How much each token counts in a distillation loss, from how hard it is: sure predictions of the teacher count, a share of the others does
//! by chance, and tokens that far context made likelier count more. The weights of a document sum to 1.

pub(crate) mod cases;
mod cuda;
pub mod naive;
#[cfg(test)]
mod tests;

use sluice_tensor::Tensor;

use crate::output_head::{Queued, RowWeights};

/// What a token must be to count, and how much it does then.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms {
    /// Above this probability a prediction of the teacher counts whatever the draw.
    pub sure: f32,
    /// Others count when their draw is below this.
    pub share: f32,
    /// A token whose loss grows by more nats than this without far context ...
    pub far_gain: f32,
    /// ... counts so many times.
    pub far_weight: f32,
}

/// Weights of the rows that `teacher` has figures of, a cross-entropy, where they are; nobody reads them. `local` has the same rows as seen
/// without far context. `draws [rows]` are uniform in [0, 1), and the rows are those of `documents[0]`, then of `documents[1]`, and so on.
/// A document of which no row counts has weights of 0.
#[track_caller]
pub fn fwd(teacher: &Queued, local: Option<&Queued>, draws: &[f32], documents: &[usize], terms: &Terms) -> RowWeights {
    let rows = teacher.weights().rows().len();
    assert!(
        draws.len() == rows
            && documents.iter().sum::<usize>() == rows
            && local.is_none_or(|l| l.weights().rows() == teacher.weights().rows()),
        "token_weights of {rows} rows with {} draws, documents of {documents:?} rows and {:?} rows seen locally",
        draws.len(),
        local.map(|local| local.weights().rows().len())
    );
    let (figures, local) = (&teacher.figures, local.map(|local| &local.figures));
    let values = match figures.gpu() {
        Some(gpu) => cuda::fwd(gpu, figures, local, draws, documents, terms),
        None => on_cpu(figures, local, draws, documents, terms),
    };
    teacher.weights().with_values(values)
}

fn on_cpu(figures: &Tensor, local: Option<&Tensor>, draws: &[f32], documents: &[usize], terms: &Terms) -> Tensor {
    let weight = |i: usize| {
        let [nll, _, probability] = [0, 1, 2].map(|k| figures.f32()[i * 3 + k]);
        let gain = local.map_or(0.0, |local| local.f32()[i * 3] - nll);
        let counts = probability > terms.sure || draws[i] < terms.share;
        if !counts {
            0.0
        } else if gain > terms.far_gain {
            terms.far_weight
        } else {
            1.0
        }
    };
    let mut weights: Vec<f32> = (0..draws.len()).map(weight).collect();
    let mut rest = weights.as_mut_slice();
    for &n in documents {
        let (document, others) = rest.split_at_mut(n);
        let sum: f32 = document.iter().sum();
        document.iter_mut().filter(|weight| **weight > 0.0).for_each(|weight| *weight /= sum);
        rest = others;
    }
    Tensor::from_vec(weights, [draws.len()])
}
