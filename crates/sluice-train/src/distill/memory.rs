//! How much of a step is in memory at a time: documents that go through the stack together, and layers that run again in the backward pass.

use anyhow::{Result, bail};
use serde::Serialize;
use sluice_model::train_memory::{self, StepShape};
use sluice_spec::RoutingConfig;
use sluice_tensor::DType;

use super::{Distiller, Work};
use crate::distill_config::DistillConfig;

/// How the documents of a step go through the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Split {
    /// Documents in one batch; a step of more has several, whose gradients are added.
    pub documents: usize,
    /// Layers, from the first on, that run again in the backward pass instead of keeping their activations.
    pub recompute: usize,
}

impl Split {
    /// All documents at once, and the layers as the settings say.
    pub(super) fn of(config: &DistillConfig, n_layers: usize) -> Self {
        Self { documents: config.documents_per_step, recompute: if config.checkpoint { n_layers } else { 0 } }
    }
}

impl Distiller {
    /// The most documents at a time, and for them the fewest layers to run again, so that the stages that pass through the stack stay
    /// within `budget` bytes. Says what is needed and what to lower when nothing does.
    pub fn fit_memory(&mut self, budget: u64) -> Result<()> {
        let (n_layers, mut documents) = (self.model.config.n_layers, self.config.documents_per_step);
        loop {
            match train_memory::fit(budget, n_layers, |recompute| self.predicted_peak(Split { documents, recompute })) {
                Ok(recompute) => {
                    self.split = Split { documents, recompute };
                    return Ok(());
                }
                Err(_) if documents > 1 => documents = documents.div_ceil(2),
                Err(train_memory::TooLarge { least }) => bail!(
                    "a step of one document of {} tokens needs {least} bytes with every layer run again, and --memory allows {budget}; \
                     lower `context`, or leave out `stage2.all_steps`, or give more memory",
                    self.config.context
                ),
            }
        }
    }

    /// Bytes that a step of the stages through the stack holds at most, counted from shapes.
    pub fn predicted_peak(&self, split: Split) -> u64 {
        let config = &self.config;
        let largest = config.budgets.iter().copied().chain([config.routing.kv_budget()]).max().expect("a chain of at least one");
        let routing = config.routing.with_kv_budget(largest).expect("budgets were validated");
        let top_k = routing.top_k + (config.schedule.overhang * routing.top_k as f32) as usize;
        let device = self.model.device();
        let shape = StepShape {
            batch: split.documents,
            context: config.context,
            recompute: split.recompute,
            gpu: device.gpu().is_some(),
            activations: device.gpu().map_or(DType::F32, |gpu| gpu.precision().activations()),
            routing: Some(RoutingConfig { top_k, ..routing }),
        };
        let base_learns = self.plan.iter().any(|work| matches!(work, Work::LogitsAll(_)));
        train_memory::distillation(&self.model.config, &shape, base_learns, self.teacher.as_ref().map(|teacher| &teacher.config))
    }
}
