//! How much of a step is in memory at a time: documents that go through the stack together, and layers that run again in the backward pass.

use anyhow::{Result, bail};
use serde::Serialize;
use sluice_model::train_memory::{self, StepShape};
use sluice_spec::RoutingConfig;

use super::Distiller;
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
    /// One document after the other, and the layers as the settings say.
    pub(super) fn of(config: &DistillConfig, n_layers: usize) -> Self {
        Self { documents: 1, recompute: if config.checkpoint { n_layers } else { 0 } }
    }
}

impl Distiller {
    /// The way for the stages that pass through the stack to stay within `budget` bytes: on a GPU as many documents together as can be, since
    /// one alone does not fill it, on a CPU one by one; then the fewest layers that run again. Says what is needed and what to lower when
    /// nothing fits.
    pub fn fit_memory(&mut self, budget: u64) -> Result<()> {
        let n_layers = self.model.config.n_layers;
        let most = if self.model.device().gpu().is_some() { self.config.documents_per_step } else { 1 };
        let batches = std::iter::successors(Some(most), |documents| (*documents > 1).then(|| documents.div_ceil(2)));
        let splits = batches.flat_map(|documents| (0..=n_layers).map(move |recompute| Split { documents, recompute }));
        let needs = |split: &Split| train_memory::with_margin(self.predicted_peak(*split));
        if let Some(split) = splits.clone().find(|split| needs(split) <= budget) {
            self.split = split;
            return Ok(());
        }
        let least = splits.map(|split| needs(&split)).min().expect("a step has a document");
        bail!(
            "a step on one document of {} tokens needs {} MiB even with every layer run again, and {} MiB are allowed; lower `context`, \
             {}or allow more (--memory)",
            self.config.context,
            least.div_ceil(1 << 20),
            budget >> 20,
            if self.base_learns() { "set `stage2.all_steps` to 0, " } else { "" },
        )
    }

    /// Bytes that a step of the stages through the stack holds at most, counted from shapes.
    pub fn predicted_peak(&self, split: Split) -> u64 {
        let config = &self.config;
        let largest = config.budgets.iter().copied().chain([config.routing.kv_budget()]).max().expect("a chain of at least one");
        let routing = config.routing.with_kv_budget(largest).expect("budgets were validated");
        let top_k = routing.top_k + (config.schedule.overhang * routing.top_k as f32) as usize;
        let shape = StepShape {
            routing: Some(RoutingConfig { top_k, ..routing }),
            ..StepShape::on(&self.model.device(), split.documents, config.context, split.recompute)
        };
        let sums = split.documents < config.documents_per_step;
        train_memory::distillation(
            &self.model.config,
            &shape,
            self.base_learns(),
            sums,
            self.teacher.as_ref().map(|teacher| &teacher.config),
        )
    }
}
