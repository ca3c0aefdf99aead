//! Planted facts: prompts that hide a fact at a chosen depth of a long filler text and ask for it at the end, and the score of an answer.
//! Works on token ids through a tokenizer and a model that are passed in; knows neither.
//!
//! A fact is a sentence with a key and a random number. Others of the same form, with other keys, stand elsewhere in the text: a model that
//! merely remembers "some number" fails. Three measures, from strict to lenient:
//! - exact: every answer token is the most likely one, which under teacher forcing is exactly when greedy decoding writes the answer;
//! - ranked first: the true value is likelier than every other value, most of which stand in the text too;
//! - nll of the answer tokens, which moves long before the other two do.

use std::collections::HashMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::bootstrap::{Bootstrap, Estimate};
use crate::report::RecallRow;
use crate::rng::Rng;

/// Text to ids, without special tokens.
pub type Tokenize<'a> = dyn Fn(&str) -> Vec<u32> + 'a;

/// Given the ids of a prompt and several continuations, the model's view of each continuation after that prompt.
pub type Model<'a> = dyn FnMut(&[u32], &[&[u32]]) -> anyhow::Result<Vec<Continuation>> + 'a;

/// Which prompts to build.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NeedleConfig {
    /// Tokens in all: prompt and the longest answer together.
    pub contexts: Vec<usize>,
    /// Where the fact stands, 0 = start of the filler, 1 = right before the question.
    pub depths: Vec<f64>,
    /// Prompts for each context and depth.
    pub n_prompts: usize,
    /// Facts with other keys planted beside the one asked for.
    pub n_distractors: usize,
    /// Values to rank, the true one included; at least all planted ones are.
    pub n_values: usize,
    /// Digits of a value.
    pub n_digits: u32,
    /// Ids that open every prompt, such as BOS.
    pub prefix: Vec<u32>,
    /// The sentences.
    pub wording: Wording,
    /// Seed of keys, values and places.
    pub seed: u64,
}

/// Sentences with `{key}` and `{value}`. The default needs no instruction tuning: the question ends in the fact's own words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Wording {
    /// The planted sentence.
    pub fact: String,
    /// What ends the prompt.
    pub question: String,
    /// What should follow.
    pub answer: String,
}

/// A text to hide facts in, cut at sentence ends.
#[derive(Clone, Debug)]
pub struct Filler {
    text: String,
    tokens: Vec<u32>,
    /// Token offsets at which a sentence begins.
    sentence_starts: Vec<usize>,
}

/// A prompt with its answers.
#[derive(Clone, Debug, PartialEq)]
pub struct NeedlePrompt {
    /// Number among the prompts of a run; pairs the scores of different policies.
    pub id: usize,
    /// Tokens in all, as configured.
    pub context: usize,
    /// Depth, as configured.
    pub depth: f64,
    /// Where the fact stands in `tokens`.
    pub fact_at: Range<usize>,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// The planted sentence.
    pub fact: String,
    /// The end of the prompt.
    pub question: String,
    /// Values to choose from; the first is true.
    pub answers: Vec<Answer>,
}

/// A value as it would follow the prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// As text.
    pub text: String,
    /// As ids.
    pub tokens: Vec<u32>,
    /// Whether it stands in the text.
    pub planted: bool,
}

/// The model's view of a continuation, token by token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Continuation {
    /// `-log p` of each token given all before it, nats.
    pub nll: Vec<f32>,
    /// The most likely token at each place.
    pub top1: Vec<u32>,
}

/// How one prompt was answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NeedleScore {
    /// [`NeedlePrompt::id`].
    pub id: usize,
    /// Who answered: `dense`, `gate`, ...
    pub policy: String,
    /// Tokens kept per KV head in all; the context for `dense`.
    pub kv_budget: usize,
    /// Tokens in all.
    pub context: usize,
    /// Depth of the fact.
    pub depth: f64,
    /// `-log p` of each token of the true answer.
    pub nll: Vec<f32>,
    /// Answer tokens that are the most likely ones.
    pub n_hits: usize,
    /// Values likelier than the true one, by mean nll per token.
    pub rank: usize,
    /// Values ranked.
    pub n_values: usize,
}

/// Prompts that cannot be built.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum NeedleError {
    /// Not enough text.
    #[error(
        "the filler text has {found} tokens after its last usable start, prompts of {context} tokens need {expected}; give a longer text or shorter contexts"
    )]
    FillerTooShort {
        /// Tokens of the text.
        found: usize,
        /// Tokens needed.
        expected: usize,
        /// Context asked for.
        context: usize,
    },
    /// No room for facts and question.
    #[error(
        "a context of {context} tokens has no room: facts, question and answer alone take {taken}; raise the context or plant fewer distractors"
    )]
    ContextTooShort {
        /// Context asked for.
        context: usize,
        /// Tokens of facts, question, answer and prefix.
        taken: usize,
    },
    /// Not a depth.
    #[error("depth {0} is not a place in the text; expected a number from 0 (start) to 1 (end)")]
    Depth(f64),
    /// Not enough different keys or values.
    #[error("{n_values} values and {n_facts} facts are more than {n_digits} digits and {n_keys} keys can tell apart; ask for fewer")]
    TooMany {
        /// Values asked for.
        n_values: usize,
        /// Facts asked for.
        n_facts: usize,
        /// Digits of a value.
        n_digits: u32,
        /// Keys there are.
        n_keys: usize,
    },
}

impl Default for NeedleConfig {
    fn default() -> Self {
        Self {
            contexts: vec![4096],
            depths: vec![0.0, 0.25, 0.5, 0.75, 1.0],
            n_prompts: 10,
            n_distractors: 3,
            n_values: 10,
            n_digits: 5,
            prefix: Vec::new(),
            wording: Wording::default(),
            seed: 0,
        }
    }
}

impl Default for Wording {
    fn default() -> Self {
        Self {
            fact: " The access code of {key} is {value}.".into(),
            question: "\n\nQuestion: What is the access code of {key}?\nAnswer: The access code of {key} is".into(),
            answer: " {value}".into(),
        }
    }
}

impl Wording {
    fn fill(template: &str, key: &str, value: &str) -> String {
        template.replace("{key}", key).replace("{value}", value)
    }
}

impl Filler {
    /// Cut `text` into sentences and tokenise each; facts are planted between sentences, never inside one.
    pub fn new(text: &str, tokenize: &Tokenize<'_>) -> Self {
        let mut tokens = Vec::new();
        let mut sentence_starts = Vec::new();
        for sentence in sentences(text) {
            sentence_starts.push(tokens.len());
            tokens.extend(tokenize(sentence));
        }
        Self { text: text.to_string(), tokens, sentence_starts }
    }

    /// Tokens of the text.
    pub fn n_tokens(&self) -> usize {
        self.tokens.len()
    }
}

/// All prompts of a run: for every context and depth `n_prompts`, each with its own key, values, stretch of filler and distractor places.
/// The same prompt number at another depth shares them all, so that depths compare like with like.
pub fn prompts(config: &NeedleConfig, filler: &Filler, tokenize: &Tokenize<'_>) -> Result<Vec<NeedlePrompt>, NeedleError> {
    if let Some(&depth) = config.depths.iter().find(|d| !(0.0..=1.0).contains(*d)) {
        return Err(NeedleError::Depth(depth));
    }
    let mut prompts = Vec::new();
    for &context in &config.contexts {
        for &depth in &config.depths {
            for number in 0..config.n_prompts {
                prompts.push(prompt(config, filler, tokenize, context, depth, number, prompts.len())?);
            }
        }
    }
    Ok(prompts)
}

fn prompt(
    config: &NeedleConfig,
    filler: &Filler,
    tokenize: &Tokenize<'_>,
    context: usize,
    depth: f64,
    number: usize,
    id: usize,
) -> Result<NeedlePrompt, NeedleError> {
    let mut rng = Rng::new(config.seed.wrapping_mul(0x2545_F491_4F6C_DD1D).wrapping_add(number as u64));
    let n_facts = 1 + config.n_distractors;
    let n_values = config.n_values.max(n_facts);
    let keys = draw_keys(&mut rng, n_facts, &filler.text);
    let values = draw_values(&mut rng, n_values, config.n_digits, &filler.text);
    if keys.len() < n_facts || values.len() < n_values {
        return Err(NeedleError::TooMany { n_values, n_facts, n_digits: config.n_digits, n_keys: ADJECTIVES.len() * NOUNS.len() });
    }

    let fill = |template: &str, i: usize| Wording::fill(template, &keys[i], &values[i]);
    let facts: Vec<String> = (0..n_facts).map(|i| fill(&config.wording.fact, i)).collect();
    let fact_tokens: Vec<Vec<u32>> = facts.iter().map(|f| tokenize(f)).collect();
    let question = fill(&config.wording.question, 0);
    let question_tokens = tokenize(&question);
    let answers: Vec<Answer> = (0..n_values)
        .map(|i| {
            let text = Wording::fill(&config.wording.answer, &keys[0], &values[i]);
            Answer { tokens: tokenize(&text), text, planted: i < n_facts }
        })
        .collect();

    let longest = answers.iter().map(|a| a.tokens.len()).max().unwrap_or(0);
    let taken = config.prefix.len() + fact_tokens.iter().map(Vec::len).sum::<usize>() + question_tokens.len() + longest;
    // Half the context at least is filler, else there is nothing to hide in.
    let n_filler = context.saturating_sub(taken);
    if n_filler < taken {
        return Err(NeedleError::ContextTooShort { context, taken });
    }
    let starts: Vec<usize> = filler.sentence_starts.iter().copied().filter(|&s| s + n_filler <= filler.n_tokens()).collect();
    if starts.is_empty() {
        return Err(NeedleError::FillerTooShort { found: filler.n_tokens(), expected: n_filler, context });
    }
    let start = starts[rng.below(starts.len())];
    let hay = &filler.tokens[start..start + n_filler];
    let mut gaps: Vec<usize> =
        filler.sentence_starts.iter().filter(|&&s| (start..=start + n_filler).contains(&s)).map(|s| s - start).collect();
    // The filler is cut to length, so its end is a place as well.
    gaps.push(n_filler);
    let wanted = (depth * n_filler as f64).round() as usize;
    let true_gap = *gaps.iter().min_by_key(|g| g.abs_diff(wanted)).expect("the end is a gap");

    // (gap, fact); at one gap the true fact stands first, so that depth 0 is the very start.
    let mut planted: Vec<(usize, usize)> = vec![(true_gap, 0)];
    planted.extend((1..n_facts).map(|i| (gaps[rng.below(gaps.len())], i)));
    planted.sort_unstable();

    let mut tokens = config.prefix.clone();
    let mut fact_at = 0..0;
    let mut done = 0;
    for (gap, fact) in planted {
        tokens.extend(&hay[done..gap]);
        done = gap;
        if fact == 0 {
            fact_at = tokens.len()..tokens.len() + fact_tokens[0].len();
        }
        tokens.extend(&fact_tokens[fact]);
    }
    tokens.extend(&hay[done..]);
    tokens.extend(&question_tokens);
    let fact = facts.into_iter().next().expect("the first fact is the one asked for");
    Ok(NeedlePrompt { id, context, depth, fact_at, tokens, fact, question, answers })
}

/// Put every prompt to the model, in order. `progress` hears how many are done.
pub fn ask(
    prompts: &[NeedlePrompt],
    policy: &str,
    kv_budget: impl Fn(usize) -> usize,
    model: &mut Model<'_>,
    progress: &mut dyn FnMut(usize),
) -> anyhow::Result<Vec<NeedleScore>> {
    let mut scores = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let answers: Vec<&[u32]> = prompt.answers.iter().map(|a| a.tokens.as_slice()).collect();
        let continuations = model(&prompt.tokens, &answers)?;
        scores.push(score(prompt, policy, kv_budget(prompt.context), &continuations));
        progress(scores.len());
    }
    Ok(scores)
}

/// Score one prompt from the model's view of each of its answers.
#[track_caller]
pub fn score(prompt: &NeedlePrompt, policy: &str, kv_budget: usize, continuations: &[Continuation]) -> NeedleScore {
    assert_eq!(continuations.len(), prompt.answers.len(), "needle: continuations for answers");
    for (c, a) in continuations.iter().zip(&prompt.answers) {
        assert!(
            c.nll.len() == a.tokens.len() && c.top1.len() == a.tokens.len(),
            "needle: {} losses and {} top tokens for an answer of {} tokens",
            c.nll.len(),
            c.top1.len(),
            a.tokens.len()
        );
    }
    // Per token: a value that happens to be fewer tokens must not win by that.
    let mean_nll = |c: &Continuation| c.nll.iter().map(|&v| f64::from(v)).sum::<f64>() / c.nll.len() as f64;
    let truth = mean_nll(&continuations[0]);
    // A tie, or a loss that is not a number, counts against the true value.
    let rank = continuations[1..].iter().filter(|c| !matches!(truth.partial_cmp(&mean_nll(c)), Some(std::cmp::Ordering::Less))).count();
    let n_hits = continuations[0].top1.iter().zip(&prompt.answers[0].tokens).filter(|(a, b)| a == b).count();
    NeedleScore {
        id: prompt.id,
        policy: policy.to_string(),
        kv_budget,
        context: prompt.context,
        depth: prompt.depth,
        nll: continuations[0].nll.clone(),
        n_hits,
        rank,
        n_values: continuations.len(),
    }
}

impl NeedleScore {
    /// Whether greedy decoding writes the answer.
    pub fn is_exact(&self) -> bool {
        self.n_hits == self.nll.len()
    }
}

/// The table of a run: a row for every context, budget, policy and depth, and one for all depths together. Loss is compared with the `dense`
/// scores of the same prompts, when they are among `scores`. Intervals take prompts, not tokens, as independent.
pub fn summarise(scores: &[NeedleScore], bootstrap: &Bootstrap) -> Vec<RecallRow> {
    let dense: HashMap<usize, &NeedleScore> = scores.iter().filter(|s| s.policy == "dense").map(|s| (s.id, s)).collect();
    let mut cells: Vec<(usize, usize, &str)> = scores.iter().map(|s| (s.context, s.kv_budget, s.policy.as_str())).collect();
    cells.sort_unstable();
    cells.dedup();
    let mut rows = Vec::new();
    for (context, kv_budget, policy) in cells {
        let of_cell: Vec<&NeedleScore> =
            scores.iter().filter(|s| s.context == context && s.kv_budget == kv_budget && s.policy == policy).collect();
        let mut depths: Vec<f64> = of_cell.iter().map(|s| s.depth).collect();
        depths.sort_by(f64::total_cmp);
        depths.dedup();
        let mut row = |depth: Option<f64>| {
            let of_row: Vec<&NeedleScore> = of_cell.iter().copied().filter(|s| depth.is_none_or(|d| s.depth == d)).collect();
            let n = of_row.len();
            let share = |of: &dyn Fn(&NeedleScore) -> f64| {
                Estimate::share((of_row.iter().map(|s| of(s)).sum::<f64>() / n as f64).min(1.0), n).expect("a cell has prompts")
            };
            let pairs: Vec<(&[f32], &[f32])> =
                of_row.iter().filter_map(|s| dense.get(&s.id).map(|d| (s.nll.as_slice(), d.nll.as_slice()))).collect();
            let (ours, theirs): (Vec<&[f32]>, Vec<&[f32]>) = pairs.into_iter().unzip();
            rows.push(RecallRow {
                policy: policy.to_string(),
                kv_budget,
                context,
                depth,
                n_prompts: n,
                token_accuracy: share(&|s| s.n_hits as f64 / s.nll.len().max(1) as f64),
                exact_match: share(&|s| f64::from(u8::from(s.is_exact()))),
                ranked_first: of_row.iter().all(|s| s.n_values > 1).then(|| share(&|s| f64::from(u8::from(s.rank == 0)))),
                nll_above_dense: bootstrap.paired_difference(&ours, &theirs),
            });
        };
        for &depth in &depths {
            row(Some(depth));
        }
        if depths.len() > 1 {
            row(None);
        }
    }
    rows
}

/// Pieces of `text` that end where a sentence does. A piece begins with the space before it, as byte-level tokenizers expect of a word.
fn sentences(text: &str) -> Vec<&str> {
    let bytes = text.as_bytes();
    let mut pieces = Vec::new();
    let mut start = 0;
    for i in 1..bytes.len() {
        let ends = |b: u8| matches!(b, b'.' | b'!' | b'?');
        let after_quote = i >= 2 && matches!(bytes[i - 1], b'"' | b'\'' | b')') && ends(bytes[i - 2]);
        let cut = match bytes[i] {
            b' ' => ends(bytes[i - 1]) || after_quote,
            // Hard-wrapped prose breaks lines inside sentences; code has no full stops, and there any line end will do in time.
            b'\n' => ends(bytes[i - 1]) || after_quote || bytes.get(i + 1) == Some(&b'\n') || i - start >= 200,
            _ => false,
        };
        // ASCII never occurs inside a UTF-8 sequence, so `i` is a character boundary.
        if cut && i > start {
            pieces.push(&text[start..i]);
            start = i;
        }
    }
    if start < text.len() {
        pieces.push(&text[start..]);
    }
    pieces
}

const ADJECTIVES: [&str; 20] = [
    "amber", "brass", "cobalt", "crimson", "distant", "eastern", "frozen", "golden", "hidden", "ivory", "lower", "marble", "northern",
    "painted", "quiet", "scarlet", "silver", "sunken", "violet", "wooden",
];
const NOUNS: [&str; 20] = [
    "archive",
    "bakery",
    "bridge",
    "cellar",
    "chapel",
    "dockyard",
    "ferry",
    "foundry",
    "garrison",
    "harbour",
    "library",
    "lighthouse",
    "mill",
    "observatory",
    "orchard",
    "pavilion",
    "quarry",
    "station",
    "tower",
    "workshop",
];

/// Different keys that do not occur in the filler; fewer than `n` when there are not that many.
fn draw_keys(rng: &mut Rng, n: usize, filler: &str) -> Vec<String> {
    let mut keys: Vec<String> = ADJECTIVES.iter().flat_map(|a| NOUNS.iter().map(move |b| format!("the {a} {b}"))).collect();
    rng.shuffle(&mut keys);
    keys.into_iter().filter(|k| !filler.contains(k.as_str())).take(n).collect()
}

/// Different numbers that do not occur in the filler; fewer than `n` when a hundred tries for each were in vain.
fn draw_values(rng: &mut Rng, n: usize, n_digits: u32, filler: &str) -> Vec<String> {
    let low = 10usize.pow(n_digits.clamp(1, 18) - 1);
    let mut values: Vec<String> = Vec::new();
    for _ in 0..100 * n {
        let value = (low + rng.below(9 * low)).to_string();
        if values.len() < n && !values.contains(&value) && !filler.contains(&value) {
            values.push(value);
        }
    }
    values
}

#[cfg(test)]
mod tests;
