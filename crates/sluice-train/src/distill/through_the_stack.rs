//! The stages in which the student's errors pass through its whole stack: the second half of stage 1, stage 2 on logits, and
//! stage 3, which asks for the same answer after a small step of the embeddings in the worst direction.

use std::collections::BTreeMap;

use sluice_autograd::{Tape, Var};
use sluice_kernels::output_head::{self, DistillTerms, RowWeights, Wanted};
use sluice_kernels::{adamw, add, dense_attention, rms_norm, token_weights};
use sluice_model::decoder::is_gate;
use sluice_model::policy::{self, AttentionPlan, Policy};
use sluice_model::{Forward, Hidden};
use sluice_spec::RoutingConfig;
use sluice_tensor::Tensor;

use super::{Distiller, QueuedReport, Work, past_budget_weights, rank_labels};
use crate::curriculum;
use crate::gate_loss::gate_loss;
use crate::hash::{mix, uniform};

/// Documents that go through the stack side by side, padded to the longest.
struct Batch {
    /// `[B T]`, padded with token 0.
    tokens: Vec<u32>,
    /// Tokens of each document.
    lens: Vec<usize>,
    /// `T`.
    t: usize,
    /// What the random choices for each document are drawn from.
    salts: Vec<u64>,
    /// Positions of each document whose labels the gates are compared with.
    samples: Vec<Vec<u32>>,
}

impl Batch {
    /// `per_row(document, its length)` of every document, padded with 0: `[B T]`.
    fn padded(&self, mut per_row: impl FnMut(usize, usize) -> Vec<f32>) -> Vec<f32> {
        let mut all = vec![0.0; self.tokens.len()];
        for (document, &len) in self.lens.iter().enumerate() {
            all[document * self.t..][..len].copy_from_slice(&per_row(document, len));
        }
        all
    }
}

/// Teacher's view of a batch.
struct TeacherPass {
    /// `[B, T, M]` outputs of the attention blocks.
    blocks: Vec<Tensor>,
    /// `[n, G]` labels of the sampled positions, by layer and document.
    labels: Vec<Vec<Tensor>>,
    /// Final hidden states `[B T, M]`, of the second teacher if there is one.
    h: Tensor,
    /// Its output head.
    head: Tensor,
}

/// What documents contributed.
struct Contribution {
    grads: BTreeMap<String, Tensor>,
    /// Sum of the main loss, `[]`, not read yet.
    shown: Tensor,
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
    pub(super) fn through_the_stack(&mut self, work: Work, step: u64) -> QueuedReport {
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

        let shared = Step { work, step, steps, plan: self.student_plan(routing, noise) };
        let mut all = self.learn(&shared);
        let norm = self.update(&mut all.grads, step, steps, gate_lr, base_lr);
        adamw::scale_in_place(&mut all.shown, 1.0 / self.config.documents_per_step as f32);
        QueuedReport { tokens: all.tokens, kv_budget: routing.kv_budget(), loss: Some(all.shown), grad_norm: Some(norm) }
    }

    /// Gradients of the mean loss over the documents of a step, in as many batches as [`Split`](super::Split) says.
    fn learn(&self, shared: &Step) -> Contribution {
        let n = self.config.documents_per_step;
        let is_attacked = |which: &u64| {
            let draw = uniform(mix(self.config.seed ^ 0xADE5, self.item(*which)));
            matches!(shared.work, Work::Generalise(_)) && draw < self.config.stage3.adversarial_share
        };
        // The length of an attack is that of one document's embeddings, so those go alone.
        let (attacked, calm): (Vec<u64>, Vec<u64>) = (0..n as u64).partition(is_attacked);
        let batches = calm.chunks(self.split.documents.max(1)).map(|batch| (batch, false)).chain(attacked.chunks(1).map(|one| (one, true)));
        let mut all = Contribution { grads: BTreeMap::new(), shown: Tensor::zeros_on(&self.model.device(), []), tokens: 0 };
        for (documents, attacked) in batches {
            let part = self.learn_from(&self.batch(documents), attacked, shared, 1.0 / n as f32);
            add_to(&mut all.grads, part.grads);
            add::assign(&mut all.shown, &part.shown);
            all.tokens += part.tokens;
        }
        all
    }

    /// Documents of the present item, side by side.
    fn batch(&self, documents: &[u64]) -> Batch {
        let texts: Vec<Vec<u32>> = documents.iter().map(|&which| self.document(which)).collect();
        let salts: Vec<u64> = documents.iter().map(|&which| self.item(which)).collect();
        let lens: Vec<usize> = texts.iter().map(Vec::len).collect();
        let t = lens.iter().copied().max().expect("a batch has documents");
        let samples = lens.iter().zip(&salts).map(|(&len, &salt)| self.ranked_positions(len, salt)).collect();
        let tokens = texts.into_iter().flat_map(|text| text.into_iter().chain(std::iter::repeat(0)).take(t)).collect();
        Batch { tokens, lens, t, salts, samples }
    }

    /// Gradients of `share` times the sum of the documents' losses.
    fn learn_from(&self, batch: &Batch, attacked: bool, shared: &Step, share: f32) -> Contribution {
        let Step { work, step, steps, plan } = shared;
        let taught = self.teach(batch, self.sampling().readers_from);

        let tape = Tape::recording();
        let options = Forward { recompute: self.split.recompute, keep_layers: true };
        let embedded = self.model.embed(&tape, &batch.tokens, batch.lens.len());
        // An attack needs the gradient of the embeddings, which are frozen in that stage.
        let embedded = if attacked { tape.leaf(embedded.value().clone()) } else { embedded };
        let student = self.model.forward_embedded(&tape, embedded.clone(), &batch.lens, plan, options);
        let weights = batch.padded(|_, len| past_budget_weights(len, &plan.routing));
        let (features, gates) = self.layer_losses(&tape, &student, &taught, batch, &weights, &plan.routing);
        let (loss, shown, weights) = if work.stage() == 1 {
            (tape.add(&features, &gates), features.value().clone(), None)
        } else {
            let weights = self.token_weights(batch, &weights, &taught, *step, *steps);
            let (logits, kl) = self.logit_loss(&tape, &student.h, &taught, &weights, self.config.stage2.boundary);
            let rest = tape.add(&tape.scale(&features, self.config.stage2.features), &gates);
            (tape.add(&logits, &rest), kl, Some(weights))
        };
        let gradients = tape.backward_scalar(&tape.scale(&loss, share));
        let attack = attacked.then(|| {
            let gradient = gradients.of(&embedded).expect("embeddings are a leaf");
            worst_step(embedded.value(), gradient, self.config.stage3.radius)
        });
        let mut grads = gradients.into_params();
        if let (Some(delta), Some(weights)) = (attack, weights) {
            let embedded = add::fwd(embedded.value(), &delta);
            add_to(&mut grads, self.under_attack(embedded, &batch.lens, &taught, &weights, plan, share));
        }
        Contribution { grads, shown, tokens: batch.lens.iter().sum() }
    }

    /// Relative errors of the attention blocks' outputs, and the losses on the gates' scores: means over the layers, sums over the documents.
    fn layer_losses(
        &self,
        tape: &Tape,
        student: &Hidden,
        taught: &TeacherPass,
        batch: &Batch,
        weights: &[f32],
        routing: &RoutingConfig,
    ) -> (Var, Var) {
        let mut sums: [Option<Var>; 2] = [None, None];
        let weights = Tensor::from_vec(weights.to_vec(), [weights.len()]).to(&self.model.device());
        for (index, (kept, block)) in student.layers.iter().zip(&taught.blocks).enumerate() {
            let slopes = &self.model.layers[index].gate.as_ref().expect("gates were added").recency.value;
            let scores = kept.scores.as_ref().expect("the gate decided");
            let mut add = |to: usize, term: Var| sums[to] = Some(sums[to].take().map_or_else(|| term.clone(), |sum| tape.add(&sum, &term)));
            add(0, tape.weighted_mse_rows(&kept.block, block, &weights));
            let rank =
                |(document, &len): (usize, &usize)| rank_labels(&batch.samples[document], &taught.labels[index][document], routing, len);
            let ranks: Vec<_> = batch.lens.iter().enumerate().map(rank).collect();
            add(1, gate_loss(tape, scores, &batch.lens, slopes, &ranks, &self.config.gate_loss));
        }
        let [features, gates] = sums.map(|sum| tape.scale(&sum.expect("a model has layers"), 1.0 / student.layers.len() as f32));
        (features, gates)
    }

    /// KL to the teacher and the decision-boundary loss, and the value of the KL alone.
    fn logit_loss(&self, tape: &Tape, h: &Var, taught: &TeacherPass, weights: &RowWeights, boundary: f32) -> (Var, Tensor) {
        let terms = DistillTerms { kl: 1.0, boundary, temperature: self.config.stage2.temperature, ..DistillTerms::default() };
        let h = tape.reshape(h, [weights.n(), self.model.config.d_model]);
        let (loss, queued) = tape.distill(&h, &tape.param(self.model.head()), &taught.h, &taught.head, None, weights, terms);
        (loss, queued.first)
    }

    /// Gradients of `share KL(p_T(x) || p_S(E + delta))`.
    fn under_attack(
        &self,
        embedded: Tensor,
        lens: &[usize],
        taught: &TeacherPass,
        weights: &RowWeights,
        plan: &AttentionPlan,
        share: f32,
    ) -> BTreeMap<String, Tensor> {
        let tape = Tape::recording();
        let options = Forward { recompute: self.split.recompute, ..Forward::default() };
        let student = self.model.forward_embedded(&tape, tape.constant(embedded), lens, plan, options);
        let (loss, _) = self.logit_loss(&tape, &student.h, taught, weights, 0.0);
        tape.backward_scalar(&tape.scale(&loss, share)).into_params()
    }

    /// Dense pass of the original weights: block outputs, labels and final hidden states; the last from the second teacher
    /// if there is one.
    fn teach(&self, batch: &Batch, readers_from: usize) -> TeacherPass {
        let tape = Tape::frozen();
        let Batch { tokens, lens, samples, .. } = batch;
        let positions: Vec<u32> = (0..batch.t as u32).collect();
        let mut h = self.original.embed(&tape, tokens, lens.len());
        let (mut blocks, mut labels) = (Vec::new(), Vec::new());
        for layer in &self.original.layers {
            let p = layer.project(&tape, &h, &positions);
            let (o, lse) = dense_attention::fwd(p.q.value(), p.k.value(), p.v.value(), 0, lens);
            labels.push(policy::future_attention_at(layer, h.value(), &p, &lse, samples, lens, readers_from));
            let block = layer.block_output(&tape, &tape.constant(o));
            h = layer.finish(&tape, &h, &block);
            blocks.push(block.value().clone());
        }
        let (h, head) = match &self.teacher {
            Some(teacher) => {
                (teacher.forward(&tape, tokens, lens, &AttentionPlan::dense(), Forward::default()).h, teacher.head().value.clone())
            }
            None => {
                let norm = tape.param(&self.original.final_norm);
                (tape.rms_norm(&h, Some(&norm), self.original.config.norm_eps), self.original.head().value.clone())
            }
        };
        TeacherPass { blocks, labels, h: h.value().reshape([tokens.len(), h.value().last_dim()]), head }
    }

    /// Weights of the positions that count in the logit loss, summing to 1 in each document: positions past the budget, through the curriculum
    /// (confident tokens and a growing share of the rest), more for tokens that need far context.
    fn token_weights(&self, batch: &Batch, past_budget: &[f32], taught: &TeacherPass, step: u64, steps: u64) -> RowWeights {
        let Batch { tokens, lens, t, salts, .. } = batch;
        // The last token of a document has no target: it does not count, nor does padding.
        let targets: Vec<u32> = tokens[1..].iter().copied().chain([0]).collect();
        let known = batch.padded(|document, len| {
            let of = |i: usize| if i + 1 < len && past_budget[document * t + i] > 0.0 { 1.0 } else { 0.0 };
            (0..len).map(of).collect()
        });
        let known = RowWeights::of(&known, &self.model.device());
        let all = output_head::queue_cross_entropy(&taught.h, &taught.head, &targets, &known, Wanted::NOTHING);
        let local = self.config.stage2.long_range.then(|| {
            // What the last `window` tokens alone predict: routed attention with no routed keys.
            let routing = RoutingConfig { top_k: 0, n_sink: 0, ..self.config.routing };
            let plan = AttentionPlan::new(Policy::Streaming, routing);
            let hidden = self.original.forward(&Tape::frozen(), tokens, lens, &plan, Forward::default()).h;
            let hidden = hidden.value().reshape([tokens.len(), self.original.config.d_model]);
            output_head::queue_cross_entropy(&hidden, &self.original.head().value, &targets, &known, Wanted::NOTHING)
        });
        let mut of_documents = vec![0; lens.len()];
        let draw = |&row: &usize| {
            of_documents[row / t] += 1;
            uniform(mix(mix(self.config.seed ^ 0xC0DE, salts[row / t]), (row % t) as u64))
        };
        let draws: Vec<f32> = known.rows().iter().map(draw).collect();
        token_weights::fwd(&all, local.as_ref(), &draws, &of_documents, &curriculum::terms(step, steps))
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
    let (norm, _) = adamw::global_norm(&[embedded], f32::INFINITY);
    // A normed row has length sqrt(M); a row without gradient stays where it is.
    let (mut step, _) = rms_norm::fwd(gradient, None, 1e-30);
    adamw::scale_in_place(&mut step, radius / (embedded.len() as f32).sqrt());
    adamw::scale_in_place_by(&mut step, &norm);
    step
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::distill_config::DistillConfig;
    use crate::documents::Documents;
    use sluice_model::Decoder;
    use sluice_spec::{Architecture, ModelConfig};
    use sluice_testkit::{Rng, small_model};

    /// Three documents a step, of different lengths, without noise (which is drawn by row, so that it depends on the batch).
    fn distiller(documents: usize) -> Distiller {
        let model = ModelConfig { max_seq_len: 2048, ..small_model(Architecture::Llama) };
        let mut config = DistillConfig {
            context: 1300,
            routing: RoutingConfig { window: 8, top_k: 56, route_every: 16, ..RoutingConfig::default() },
            budgets: vec![64],
            documents_per_step: 3,
            ..DistillConfig::default()
        };
        config.schedule.noise = 0.0;
        config.stage3.noise = 0.0;
        config.stage3.adversarial_share = 0.5;
        config.stage0.readers_from = 16;
        // Every term there is; and without this one nothing but rounding reaches a gate's intercept.
        config.gate_loss.rank = 0.1;
        let mut rng = Rng::new(4);
        let lens = [1300, 1100, 1210, 1170, 1250, 1130];
        let texts = lens.map(|len| (0..len).map(|_| rng.below(64) as u32).collect()).to_vec();
        let mut run = Distiller::new(Decoder::random(&model, 9), None, config, Documents::new(texts, 600).unwrap()).unwrap();
        // Gates that prefer some keys; without them only the recency of a key would count.
        for layer in &mut run.model.layers {
            let gate = Arc::make_mut(layer).gate.as_mut().unwrap();
            gate.weight.value = rng.normal_tensor(gate.weight.value.shape().to_vec());
            gate.weight.value.f32_mut().iter_mut().for_each(|w| *w *= 0.3);
        }
        run.split.documents = documents;
        run
    }

    #[test]
    fn a_ragged_batch_learns_what_its_documents_teach_one_by_one() {
        for work in [Work::EndToEnd(0), Work::Logits(0), Work::LogitsAll(0), Work::Generalise(0)] {
            let of = |documents: usize| {
                let mut run = distiller(documents);
                run.model.set_trainable(|name| work == Work::LogitsAll(0) || is_gate(name));
                let routing = RoutingConfig { gate_temperature: 0.5, ..run.config.routing };
                let lens: Vec<usize> = (0..3).map(|which| run.document(which).len()).collect();
                assert!(lens.iter().any(|len| *len != lens[0]), "{lens:?} is not ragged");
                run.learn(&Step { work, step: 0, steps: 1, plan: run.student_plan(routing, None) })
            };
            let (alone, together, in_two) = (of(1), of(3), of(2));
            for all in [together, in_two] {
                assert_eq!((all.tokens, all.grads.len()), (alone.tokens, alone.grads.len()), "{work:?}");
                let (a, b) = (all.shown.item(), alone.shown.item());
                assert!((a / b - 1.0).abs() < 1e-5, "{work:?}: loss {a} and {b}");
                for (name, gradient) in &all.grads {
                    let expected = alone.grads[name].f32();
                    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| (x as f64).powi(2)).sum::<f64>().sqrt();
                    let size = norm(&mut expected.iter().copied());
                    let error = norm(&mut gradient.f32().iter().zip(expected).map(|(a, b)| a - b));
                    assert!(size > 0.0 && error <= 1e-4 * size, "{work:?}: gradient of {name} is off by {error:e} of {size:e}");
                }
            }
        }
    }

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
