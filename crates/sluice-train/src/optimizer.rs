//! AdamW over a model's trainable parameters, with clipping by the global norm.
//! State is keyed by parameter name, so what is saved does not depend on the order of parameters.

use std::collections::BTreeMap;

use sluice_autograd::Param;
use sluice_kernels::adamw::{self, AdamW};
use sluice_tensor::{Device, Tensor};

use crate::schedule::OptimizerConfig;

/// Moments of every parameter that has been stepped.
#[derive(Clone, Default)]
pub struct Optimizer {
    /// Steps taken.
    pub step: u64,
    /// First moments by parameter name.
    pub m: BTreeMap<String, Tensor>,
    /// Second moments by parameter name.
    pub v: BTreeMap<String, Tensor>,
}

impl Optimizer {
    /// The moments on another device.
    pub fn to(&self, device: &Device) -> Self {
        let moved = |moments: &BTreeMap<String, Tensor>| moments.iter().map(|(name, t)| (name.clone(), t.to(device))).collect();
        Self { step: self.step, m: moved(&self.m), v: moved(&self.v) }
    }

    /// Step every trainable parameter that has a gradient, clipped to the global norm, and take that gradient out of `grads`.
    /// `rate` is the learning rate of a parameter, already scheduled. Returns the norm before clipping, `[]`, where the gradients are: who
    /// reads it waits for the step. With a norm that is not finite no parameter and no moment changes.
    pub fn apply<'a>(
        &mut self,
        params: impl IntoIterator<Item = &'a mut Param>,
        grads: &mut BTreeMap<String, Tensor>,
        config: &OptimizerConfig,
        rate: impl Fn(&str) -> f32,
    ) -> Tensor {
        let (norm, grad_scale) = adamw::global_norm(&grads.values().collect::<Vec<_>>(), config.clip);
        self.step += 1;
        for param in params.into_iter().filter(|p| p.trainable) {
            let Some(grad) = grads.remove(&param.name) else { continue };
            let zeros = || Tensor::zeros_on(&param.value.device(), param.value.shape());
            let m = self.m.entry(param.name.clone()).or_insert_with(zeros);
            let v = self.v.entry(param.name.clone()).or_insert_with(zeros);
            // Norms and biases are scales and offsets: pulling them to zero is not regularisation.
            let weight_decay = if param.value.shape().len() >= 2 { config.weight_decay } else { 0.0 };
            let settings =
                AdamW { lr: rate(&param.name), beta1: config.beta1, beta2: config.beta2, eps: config.eps, weight_decay, step: self.step };
            adamw::step(&mut param.value, &grad, m, v, &grad_scale, settings);
        }
        norm
    }
}
