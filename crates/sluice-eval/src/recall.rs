//! Recall of planted facts in generated documents: can the model still give the value of a key that it read long ago?

use sluice_data::recall::RecallDocument;
use sluice_model::{AttentionPlan, Decoder, Policy};

use crate::bootstrap::{Bootstrap, Estimate};
use crate::quality::{Comparison, compare, dense_hidden};
use crate::report::RecallRow;

/// Answers of one document under one policy.
#[derive(Clone, Debug, Default)]
struct Answers {
    /// Per answer token: 1 where greedy decoding gives it.
    hits: Vec<f32>,
    /// Per answer: 1 where every token is given.
    exact: Vec<f32>,
    nll: Vec<f32>,
    nll_dense: Vec<f32>,
}

/// Ask every policy the questions of documents at several depths, `[(depth, documents)]`. Teacher-forced: an answer
/// counts when each of its tokens is the most likely one after the true ones before it.
pub fn recall_rows(
    model: &Decoder,
    by_depth: &[(f64, Vec<RecallDocument>)],
    comparison: &Comparison,
    mut progress: impl FnMut(),
) -> Vec<RecallRow> {
    let context = by_depth.iter().flat_map(|(_, docs)| docs).map(|d| d.tokens.len()).max().unwrap_or(0);
    let mut cells = comparison.cells();
    cells.insert(0, (Policy::Dense, comparison.routing));
    let mut answers: Vec<Vec<Vec<Answers>>> = vec![vec![Vec::new(); by_depth.len()]; cells.len()]; // [cell][depth][document]
    for (di, (_, documents)) in by_depth.iter().enumerate() {
        for document in documents {
            let dense = dense_hidden(model, &document.tokens);
            let first = document.answers.iter().map(|a| a.start).min().unwrap_or(document.tokens.len());
            for ((policy, routing), answers) in cells.iter().zip(&mut answers) {
                let plan = AttentionPlan::new(*policy, *routing);
                answers[di].push(of_document(model, document, &dense, &plan, first));
                progress();
            }
        }
    }
    let bootstrap = Bootstrap { block_len: 1, ..Bootstrap::default() };
    let mut rows = Vec::new();
    for ((policy, routing), by_depth_answers) in cells.iter().zip(&answers) {
        let depths = by_depth.iter().map(|(depth, _)| Some(*depth)).zip(by_depth_answers.iter().map(|d| d.iter().collect::<Vec<_>>()));
        let all = (None, by_depth_answers.iter().flatten().collect::<Vec<_>>());
        for (depth, documents) in depths.chain([all]) {
            let n_prompts = documents.iter().map(|d| d.exact.len()).sum();
            let pick = |f: fn(&Answers) -> &Vec<f32>| -> Vec<&Vec<f32>> { documents.iter().map(|d| f(d)).collect() };
            // Answers are the trials: the tokens of one answer stand and fall together.
            let share = |values: Vec<&Vec<f32>>| {
                let (sum, n) = values.iter().fold((0.0, 0), |(s, n), v| (s + v.iter().map(|&x| x as f64).sum::<f64>(), n + v.len()));
                Estimate::share(if n == 0 { 0.0 } else { (sum / n as f64).clamp(0.0, 1.0) }, n_prompts)
            };
            let (Some(token_accuracy), Some(exact_match)) = (share(pick(|a| &a.hits)), share(pick(|a| &a.exact))) else { continue };
            rows.push(RecallRow {
                policy: policy.name().into(),
                kv_budget: if *policy == Policy::Dense { context } else { routing.kv_budget() },
                context,
                depth,
                n_prompts,
                token_accuracy,
                exact_match,
                ranked_first: None,
                nll_above_dense: bootstrap.paired_difference(&pick(|a| &a.nll), &pick(|a| &a.nll_dense)),
            });
        }
    }
    rows
}

fn of_document(model: &Decoder, document: &RecallDocument, dense: &sluice_tensor::Tensor, plan: &AttentionPlan, first: usize) -> Answers {
    let scored = compare(model, &document.tokens, dense, plan, first);
    let mut answers = Answers::default();
    for answer in &document.answers {
        let at = answer.start - first..answer.start - first + answer.len;
        let hits = &scored.hit[at.clone()];
        answers.hits.extend_from_slice(hits);
        answers.exact.push(if hits.iter().all(|h| *h == 1.0) { 1.0 } else { 0.0 });
        answers.nll.extend_from_slice(&scored.nll[at.clone()]);
        answers.nll_dense.extend_from_slice(&scored.nll_dense[at]);
    }
    answers
}
