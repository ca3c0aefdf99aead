//! Normalisation over the last axis.

use sluice_kernels::{layer_norm, rms_norm};

use crate::tape::{Tape, Var};

impl Tape {
    /// `x / sqrt(mean(x^2) + eps) * weight` over the last axis.
    #[track_caller]
    pub fn rms_norm(&self, x: &Var, weight: Option<&Var>, eps: f32) -> Var {
        let (y, inv_rms) = rms_norm::fwd(x.value(), weight.map(Var::value), eps);
        let (x_value, w_value) = (x.value().clone(), weight.map(|w| w.value().clone()));
        let inputs: Vec<&Var> = [x].into_iter().chain(weight).collect();
        let n_inputs = inputs.len();
        self.custom_onto(&inputs, y, move |dy, before| {
            let (dx, dweight) = rms_norm::bwd_onto(before, dy, &x_value, w_value.as_ref(), &inv_rms);
            let mut gradients = vec![Some(dx), dweight];
            gradients.truncate(n_inputs);
            gradients
        })
    }

    /// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis.
    #[track_caller]
    pub fn layer_norm(&self, x: &Var, weight: &Var, bias: &Var, eps: f32) -> Var {
        let (y, mean, inv_std) = layer_norm::fwd(x.value(), weight.value(), bias.value(), eps);
        let (x_value, w_value) = (x.value().clone(), weight.value().clone());
        self.custom(&[x, weight, bias], y, move |dy| {
            let (dx, dweight, dbias) = layer_norm::bwd(dy, &x_value, &w_value, &mean, &inv_std);
            vec![Some(dx), Some(dweight), Some(dbias)]
        })
    }
}
