//! The stages in which the student's errors pass through its whole stack: the second half of stage 1, stage 2 on logits, and
//! stage 3, which asks for the same answer after a small step of the embeddings in the worst direction.

use std::collections::BTreeMap;

use anyhow::Result;
use sluice_autograd::{Tape, Var};
use sluice_kernels::output_head::{self, DistillTerms, Wanted};
use sluice_kernels::{adamw, add, dense_attention, rms_norm};
use sluice_model::decoder::is_gate;
use sluice_model::policy::{self, AttentionPlan, Policy};
use sluice_model::{Forward, Hidden};
use sluice_spec::RoutingConfig;
use sluice_tensor::Tensor;

use super::{Distiller, StepReport, Work, past_budget_weights, rank_labels, report};
use crate::curriculum::{self, Difficulty};
use crate::gate_loss::gate_loss;
use crate::hash::{mix, uniform};

/// Teacher's view of one document.
struct TeacherPass {
    /// `[1, T, M]` outputs of the attention blocks.
    blocks: Vec<Tensor>,
    /// `[n, G]` labels of the sampled positions.
    labels: Vec<Tensor>,
    /// Final hidden states `[T, M]`, of the second teacher if there is one.
    h: Tensor,
    /// Its output head.
    head: Tensor,
}

/// What one document contributed.
struct Contribution {
    grads: BTreeMap<String, Tensor>,
    /// The main loss.
    shown: f32,
    tokens: usize,
}

/// What all documents of a step have in common.
struct Step {
    work: Work,
    step: u64,
    steps: u64,
    plan: AttentionPlan,
}

impl Distiller {
    /// One update from `documents_per_step` documents, the routed student end to end against the dense teacher.
    pub(super) fn through_the_stack(&mut self, work: Work, step: u64) -> Result<StepReport> {
        let (steps, gate_lr, base_lr) = match work {
            Work::EndToEnd(_) => (self.config.stage1.end_to_end_steps, self.config.stage1.lr, 0.0),
            Work::Logits(_) => (self.config.stage2.gate_steps, self.config.stage2.gate_lr, 0.0),
            Work::Generalise(_) => (self.config.stage3.steps, self.config.stage3.gate_lr, 0.0),
            _ => (self.config.stage2.all_steps, self.config.stage2.gate_lr_with_base, self.config.stage2.base_lr),
        };
        // The gates have been through the ramp in the layer-local half; only a run without it ramps here.
        let ramped = matches!(work, Work::EndToEnd(_)) && self.config.stage1.layer_local_steps == 0;
        let routing = self.step_routing(if ramped { step } else { steps }, steps);
        let temperature = self.config.schedule.temperature_to;
        let routing = RoutingConfig { gate_temperature: temperature, ..routing };
        let noise = match work {
            Work::Generalise(_) => self.gate_noise(self.config.stage3.noise * temperature),
            _ => self.noise(steps, steps),
        };
        self.model.set_trainable(|name| base_lr > 0.0 || is_gate(name));

        let n = self.config.documents_per_step;
        let shared = Step { work, step, steps, plan: self.student_plan(routing, noise) };
        let (mut grads, mut shown, mut tokens) = (BTreeMap::new(), 0.0, 0);
        for which in 0..n as u64 {
            let part = self.learn_from(&self.document(which), which, &shared, 1.0 / n as f32);
            add_to(&mut grads, part.grads);
            shown += part.shown / n as f32;
            tokens += part.tokens;
        }
        let norm = self.update(&mut grads, step, steps, gate_lr, base_lr)?;
        Ok(report(work, tokens, Some(shown), routing.kv_budget(), Some(norm)))
    }

    /// Gradients of `share` times the loss on one document.
    fn learn_from(&self, tokens: &[u32], which: u64, shared: &Step, share: f32) -> Contribution {
        let Step { work, step, steps, plan } = shared;
        let (t, salt) = (tokens.len(), self.item(which));
        let sampling = self.sampling();
        let samples = [sampling.positions(t, mix(self.config.seed, salt))];
        let taught = self.teach(tokens, &samples, sampling.readers_from);
        let attacked =
            matches!(work, Work::Generalise(_)) && uniform(mix(self.config.seed ^ 0xADE5, salt)) < self.config.stage3.adversarial_share;

        let tape = Tape::recording();
        let options = Forward { checkpoint: self.config.checkpoint, keep_layers: true };
        let embedded = self.model.embed(&tape, tokens, 1);
        // An attack needs the gradient of the embeddings, which are frozen in that stage.
        let embedded = if attacked { tape.leaf(embedded.value().clone()) } else { embedded };
        let student = self.model.forward_embedded(&tape, embedded.clone(), &[t], plan, options);
        let weights = past_budget_weights(t, &plan.routing);
        let (features, gates) = self.layer_losses(&tape, &student, &taught, &samples[0], &weights, &plan.routing);
        let (loss, shown, weights) = if work.stage() == 1 {
            (tape.add(&features, &gates), features.value().item(), weights)
        } else {
            let weights = self.token_weights(tokens, &weights, &taught, *step, *steps, salt);
            let (logits, kl) = self.logit_loss(&tape, &student.h, &taught, &weights, self.config.stage2.boundary);
            let rest = tape.add(&tape.scale(&features, self.config.stage2.features), &gates);
            (tape.add(&logits, &rest), kl, weights)
        };
        let gradients = tape.backward_scalar(&tape.scale(&loss, share));
        let attack = attacked.then(|| {
            let gradient = gradients.of(&embedded).expect("embeddings are a leaf");
            worst_step(embedded.value(), gradient, self.config.stage3.radius)
        });
        let mut grads = gradients.into_params();
        if let Some(delta) = attack {
            let embedded = add::fwd(embedded.value(), &delta);
            add_to(&mut grads, self.under_attack(embedded, t, &taught, &weights, plan, share));
        }
        Contribution { grads, shown, tokens: t }
    }

    /// Relative errors of the attention blocks' outputs, and the losses on the gates' scores: means over the layers.
    fn layer_losses(
        &self,
        tape: &Tape,
        student: &Hidden,
        taught: &TeacherPass,
        samples: &[u32],
        weights: &[f32],
        routing: &RoutingConfig,
    ) -> (Var, Var) {
        let mut sums: [Option<Var>; 2] = [None, None];
        for (index, (kept, block)) in student.layers.iter().zip(&taught.blocks).enumerate() {
            let slopes = &self.model.layers[index].gate.as_ref().expect("gates were added").recency.value;
            let rank = rank_labels(samples, &taught.labels[index], routing, weights.len());
            let scores = kept.scores.as_ref().expect("the gate decided");
            let terms =
                [tape.weighted_mse_rows(&kept.block, block, weights), gate_loss(tape, scores, slopes, rank, &self.config.gate_loss)];
            for (sum, term) in sums.iter_mut().zip(terms) {
                *sum = Some(sum.take().map_or_else(|| term.clone(), |s| tape.add(&s, &term)));
            }
        }
        let [features, gates] = sums.map(|sum| tape.scale(&sum.expect("a model has layers"), 1.0 / student.layers.len() as f32));
        (features, gates)
    }

    /// KL to the teacher and the decision-boundary loss, and the value of the KL alone.
    fn logit_loss(&self, tape: &Tape, h: &Var, taught: &TeacherPass, weights: &[f32], boundary: f32) -> (Var, f32) {
        let terms = DistillTerms { kl: 1.0, boundary, temperature: self.config.stage2.temperature, ..DistillTerms::default() };
        let h = tape.reshape(h, [weights.len(), self.model.config.d_model]);
        let (loss, parts) = tape.distill(&h, &tape.param(self.model.head()), &taught.h, &taught.head, None, weights, terms);
        (loss, weights.iter().zip(&parts.kl).map(|(w, kl)| w * kl).sum())
    }

    /// Gradients of `share KL(p_T(x) || p_S(E + delta))`.
    fn under_attack(
        &self,
        embedded: Tensor,
        t: usize,
        taught: &TeacherPass,
        weights: &[f32],
        plan: &AttentionPlan,
        share: f32,
    ) -> BTreeMap<String, Tensor> {
        let tape = Tape::recording();
        let options = Forward { checkpoint: self.config.checkpoint, ..Forward::default() };
        let student = self.model.forward_embedded(&tape, tape.constant(embedded), &[t], plan, options);
        let (loss, _) = self.logit_loss(&tape, &student.h, taught, weights, 0.0);
        tape.backward_scalar(&tape.scale(&loss, share)).into_params()
    }

    /// Dense pass of the original weights: block outputs, labels and final hidden states; the last from the second teacher
    /// if there is one.
    fn teach(&self, tokens: &[u32], samples: &[Vec<u32>; 1], readers_from: usize) -> TeacherPass {
        let tape = Tape::frozen();
        let t = tokens.len();
        let positions: Vec<u32> = (0..t as u32).collect();
        let mut h = self.original.embed(&tape, tokens, 1);
        let (mut blocks, mut labels) = (Vec::new(), Vec::new());
        for layer in &self.original.layers {
            let p = layer.project(&tape, &h, &positions);
            let (o, lse) = dense_attention::fwd(p.q.value(), p.k.value(), p.v.value(), 0, &[t]);
            labels.extend(policy::future_attention_at(layer, h.value(), &p, &lse, samples, &[t], readers_from));
            let block = layer.block_output(&tape, &tape.constant(o));
            h = layer.finish(&tape, &h, &block);
            blocks.push(block.value().clone());
        }
        let (h, head) = match &self.teacher {
            Some(teacher) => {
                (teacher.forward(&tape, tokens, &[t], &AttentionPlan::dense(), Forward::default()).h, teacher.head().value.clone())
            }
            None => {
                let norm = tape.param(&self.original.final_norm);
                (tape.rms_norm(&h, Some(&norm), self.original.config.norm_eps), self.original.head().value.clone())
            }
        };
        TeacherPass { blocks, labels, h: h.value().reshape([t, h.value().last_dim()]), head }
    }

    /// Weight of every position in the logit loss, summing to 1: positions past the budget, through the curriculum
    /// (confident tokens and a growing share of the rest), more for tokens that need far context.
    fn token_weights(&self, tokens: &[u32], past_budget: &[f32], taught: &TeacherPass, step: u64, steps: u64, salt: u64) -> Vec<f32> {
        let t = tokens.len();
        let targets: Vec<u32> = tokens[1..].iter().copied().chain([0]).collect();
        let known: Vec<f32> = past_budget.iter().enumerate().map(|(i, &w)| if i + 1 < t && w > 0.0 { 1.0 } else { 0.0 }).collect();
        let all = output_head::cross_entropy(&taught.h, &taught.head, &targets, &known, Wanted::NOTHING);
        let local = self.config.stage2.long_range.then(|| {
            // What the last `window` tokens alone predict: routed attention with no routed keys.
            let routing = RoutingConfig { top_k: 0, n_sink: 0, ..self.config.routing };
            let plan = AttentionPlan::new(Policy::Streaming, routing);
            let hidden = self.original.forward(&Tape::frozen(), tokens, &[t], &plan, Forward::default()).h;
            let hidden = hidden.value().reshape([t, self.original.config.d_model]);
            output_head::cross_entropy(&hidden, &self.original.head().value, &targets, &known, Wanted::NOTHING).nll
        });
        let seed = mix(self.config.seed ^ 0xC0DE, salt);
        let mut weights: Vec<f32> = (0..t)
            .map(|i| {
                let gain = local.as_ref().map_or(0.0, |local| local[i] - all.nll[i]);
                let token = Difficulty { max_prob: all.max_prob[i], long_range_gain: gain };
                known[i] * curriculum::weight(&token, step, steps, mix(seed, i as u64))
            })
            .collect();
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum.max(1e-6));
        weights
    }
}

fn add_to(sum: &mut BTreeMap<String, Tensor>, grads: BTreeMap<String, Tensor>) {
    for (name, grad) in grads {
        match sum.get_mut(&name) {
            Some(sum) => add::assign(sum, &grad),
            None => {
                sum.insert(name, grad);
            }
        }
    }
}

/// Step of every embedding `[.., M]` up its gradient, of length `radius rms(E) sqrt(M)`.
fn worst_step(embedded: &Tensor, gradient: &Tensor, radius: f32) -> Tensor {
    let rms = adamw::global_norm(&[embedded]) as f32 / (embedded.len() as f32).sqrt();
    // A normed row has length sqrt(M); a row without gradient stays where it is.
    let (mut step, _) = rms_norm::fwd(gradient, None, 1e-30);
    adamw::scale_in_place(&mut step, radius * rms);
    step
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_testkit::Rng;

    #[test]
    fn an_attack_follows_the_gradient_and_has_one_length() {
        let mut rng = Rng::new(6);
        let (embedded, mut gradient) = (rng.normal_tensor([1, 3, 64]), rng.normal_tensor([1, 3, 64]));
        // Gradients of a mean over many tokens are tiny.
        gradient.f32_mut().iter_mut().for_each(|g| *g *= 1e-7);
        gradient.f32_mut()[128..].fill(0.0);
        let step = worst_step(&embedded, &gradient, 0.05);
        let length = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
        let expected = 0.05 * length(embedded.f32()) / 3f32.sqrt();
        for row in 0..2 {
            let (step, gradient) = (&step.f32()[row * 64..][..64], &gradient.f32()[row * 64..][..64]);
            let along: f32 = step.iter().zip(gradient).map(|(a, b)| a * b).sum();
            assert!((length(step) / expected - 1.0).abs() < 1e-4);
            assert!((along / (length(step) * length(gradient)) - 1.0).abs() < 1e-4);
        }
        assert!(step.f32()[128..].iter().all(|s| *s == 0.0));
    }
}
