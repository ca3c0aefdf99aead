//! Stage 1, first half: every layer learns from the teacher's own input, so nothing is propagated through the stack.

use std::collections::BTreeMap;

use sluice_autograd::{Tape, Var};
use sluice_kernels::dense_attention;
use sluice_model::decoder::is_gate;
use sluice_model::policy;
use sluice_tensor::Tensor;

use super::{Distiller, QueuedReport, past_budget_weights, rank_labels};
use crate::gate_loss::gate_loss;

impl Distiller {
    /// `|o_S - o_T|^2 / |o_T|^2` of every layer, each fed the teacher's input.
    pub(super) fn layer_local(&mut self, step: u64) -> QueuedReport {
        let tokens = self.document(0);
        let (t, steps) = (tokens.len(), self.config.stage1.layer_local_steps);
        let routing = self.step_routing(step, steps);
        let plan = self.student_plan(routing, self.noise(step, steps));
        let readers_from = self.sampling().readers_from;
        let samples = [self.ranked_positions(t, self.cursor as u64)];
        let weights = past_budget_weights(t, &routing);
        let weights = Tensor::from_vec(weights, [t]).to(&self.model.device());
        let positions: Vec<u32> = (0..t as u32).collect();
        self.model.set_trainable(is_gate);
        let frozen = Tape::frozen();
        let mut h = self.model.embed(&frozen, &tokens, 1);
        let mut grads = BTreeMap::new();
        let mut total: Option<Var> = None;
        for (index, layer) in self.model.layers.iter().enumerate() {
            let p = layer.project(&frozen, &h, &positions);
            let (o, lse) = dense_attention::fwd(p.q.value(), p.k.value(), p.v.value(), 0, &[t]);
            let labels = policy::future_attention_at(layer, h.value(), &p, &lse, &samples, &[t], readers_from);
            let block = layer.block_output(&frozen, &frozen.constant(o)); // the teacher's, [1, T, M]

            let tape = Tape::recording();
            let (o, scores) = plan.attend(&tape, layer, index, &h, &p, &[t]);
            let scores = scores.expect("the gate decided");
            let student = layer.block_output(&tape, &o);
            let features = tape.weighted_mse_rows(&student, block.value(), &weights);
            let slopes = &layer.gate.as_ref().expect("gates were added").recency.value;
            let rank = rank_labels(&samples[0], &labels[0], &routing, t);
            let loss = tape.add(&features, &gate_loss(&tape, &scores, &[t], slopes, &[rank], &self.config.gate_loss));
            let features = features.detach();
            total = Some(total.map_or_else(|| features.clone(), |sum| frozen.add(&sum, &features)));
            grads.extend(tape.backward_scalar(&loss).into_params());
            h = layer.finish(&frozen, &h, &block);
        }
        let norm = self.update(&mut grads, step, steps, self.config.stage1.lr, 0.0);
        let mean = frozen.scale(&total.expect("a model has layers"), 1.0 / self.model.layers.len() as f32);
        QueuedReport { tokens: t, kv_budget: routing.kv_budget(), loss: Some(mean.value().clone()), grad_norm: Some(norm) }
    }
}
