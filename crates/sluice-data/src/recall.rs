//! Documents made to measure memory: facts planted in real text and asked for long after, several at once.
//! Works on token ids; knows nothing about models.
//!
//! A fact is a key of two words followed at once by its value, "Remember the silver lantern copper."; a question repeats
//! the key, "Asked for the silver lantern copper.", and its last words are the answer. So the answer is an induction: find
//! the earlier place with this key, copy what came next. A model of a million parameters learns it within a few million
//! tokens, and whether it still can depends on what its router kept. Distractors have the form of facts and are never asked.

use crate::Tokenizer;
use crate::embedded::Split;
use crate::hash::Rng;

/// Where facts and questions stand in a document.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Placement {
    /// Facts anywhere in the first 60 % of the text; this share of the questions follows its fact within 64 tokens,
    /// the others come at any later place. For training.
    Spread {
        /// Share of near questions.
        near: f32,
    },
    /// Facts within 2 % of this relative depth (0 = first, 1 = last), distractors anywhere, questions at the end. For evaluation.
    Needle {
        /// Relative position of the facts.
        depth: f32,
    },
}

/// What a recall document consists of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RecallConfig {
    /// Tokens of the document, exactly.
    pub len: usize,
    /// Facts that are asked for.
    pub facts: usize,
    /// Facts that are not.
    pub distractors: usize,
    /// Questions; at least one per fact. A fact asked again can be answered from its earlier question too.
    pub questions: usize,
    /// Where they stand.
    pub placement: Placement,
    /// Share of values with two words.
    pub two_words: f32,
    /// Share of values that are two-digit numbers.
    pub digits: f32,
    /// Share of distractors whose key has its last word in common with a fact's key, so that one word does not identify it.
    pub confusable: f32,
    /// One in five combinations of key and value occurs in held-out documents only.
    pub split: Split,
}

impl RecallConfig {
    /// A training document of this length: about a sixth of its tokens are questions, another sixth facts.
    pub fn training(len: usize) -> Self {
        let facts = (len / 64).clamp(1, 32);
        Self {
            len,
            facts,
            distractors: facts / 2,
            questions: (len / 40).max(facts),
            placement: Placement::Spread { near: 0.25 },
            two_words: 0.25,
            digits: 0.0,
            confusable: 0.25,
            split: Split::Train,
        }
    }

    /// A document packed with facts and questions, two of them per fact: two thirds of its tokens. For the
    /// first steps of a training, where sequences are short and [`Self::training`] would ask three questions.
    pub fn drill(len: usize) -> Self {
        let facts = (len / 40).clamp(1, 24);
        Self { facts, distractors: facts / 4, questions: 2 * facts, ..Self::training(len) }
    }

    /// A held-out document: eight facts at a depth, eight distractors, every fact asked once at the end.
    pub fn needle(len: usize, depth: f32) -> Self {
        Self { facts: 8, distractors: 8, questions: 8, placement: Placement::Needle { depth }, split: Split::Held, ..Self::training(len) }
    }
}

/// Where a question's answer stands, and what is needed to give it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AnswerSpan {
    /// Index of the answer's first token.
    pub start: usize,
    /// Tokens of the answer.
    pub len: usize,
    /// Index of the first token of the value where the fact was stated.
    pub fact_pos: usize,
    /// The same for the latest place before this question: the fact, or an earlier question about it.
    pub last_seen: usize,
    /// `fact_pos` relative to the document: 0 = first token, 1 = last.
    pub depth: f32,
}

impl AnswerSpan {
    /// Tokens between the latest place where the answer could be seen and the question.
    pub fn distance(&self) -> usize {
        self.start - self.last_seen
    }
}

/// A recall document with its answers in the order of the text.
#[derive(Clone, Debug, PartialEq)]
pub struct RecallDocument {
    /// Token ids, exactly `config.len`.
    pub tokens: Vec<u32>,
    /// Every question's answer.
    pub answers: Vec<AnswerSpan>,
}

/// Sentences of real text around the facts, encoded once.
#[derive(Clone, Debug)]
pub struct Filler {
    sentences: Vec<Vec<u32>>,
}

impl Filler {
    /// Cut these texts into sentences.
    pub fn new(tokenizer: &Tokenizer, texts: &[&str]) -> Self {
        let sentences: Vec<String> = texts.iter().flat_map(|text| sentences(text)).collect();
        assert!(!sentences.is_empty(), "recall filler: {} texts without a sentence", texts.len());
        let refs: Vec<&str> = sentences.iter().map(String::as_str).collect();
        Self { sentences: tokenizer.encode_batch(&refs) }
    }
}

/// Makes recall documents with one tokenizer and one filler.
#[derive(Clone, Debug)]
pub struct RecallGenerator {
    config: RecallConfig,
    filler: Filler,
    bos: Option<u32>,
    statements: Vec<Phrase>,
    questions: Vec<Phrase>,
    adjectives: Vec<Vec<u32>>,
    nouns: Vec<Vec<u32>>,
    values: Vec<Vec<u32>>,
    digits: Vec<Vec<u32>>,
}

impl RecallGenerator {
    /// Prepare for documents of this kind. Panics when the events alone would fill more than four fifths of a document.
    #[track_caller]
    pub fn new(config: RecallConfig, tokenizer: &Tokenizer, filler: Filler) -> Self {
        assert!(config.facts >= 1 && config.questions >= config.facts, "recall: {} questions for {} facts", config.questions, config.facts);
        assert!(
            config.facts + config.distractors <= ADJECTIVES.len() * NOUNS.len() / 2,
            "recall: {} keys of {}",
            config.facts + config.distractors,
            ADJECTIVES.len() * NOUNS.len()
        );
        let encode = |text: &str| if text.is_empty() { Vec::new() } else { tokenizer.encode(text) };
        let words = |list: &[&str]| list.iter().map(|word| encode(&format!(" {word}"))).collect::<Vec<_>>();
        let phrases = |list: &[&str]| list.iter().map(|before| Phrase { before: encode(before), after: encode(".") }).collect::<Vec<_>>();
        let generator = Self {
            config,
            filler,
            bos: tokenizer.bos(),
            statements: phrases(&STATEMENTS),
            questions: phrases(&QUESTIONS),
            adjectives: words(&ADJECTIVES),
            nouns: words(&NOUNS),
            values: words(&VALUES),
            digits: (0..100).map(|n| encode(&format!(" {n:02}"))).collect(),
        };
        let longest = |phrases: &[Phrase]| phrases.iter().map(|p| p.before.len() + p.after.len()).max().unwrap_or(0);
        let digits = if config.digits > 0.0 { max_len(&generator.digits) } else { 0 };
        let value = (2 * max_len(&generator.values)).max(digits);
        let key_and_value = max_len(&generator.adjectives) + max_len(&generator.nouns) + value;
        let events = (config.facts + config.distractors) * (longest(&generator.statements) + key_and_value)
            + config.questions * (longest(&generator.questions) + key_and_value);
        assert!(
            events * 5 <= config.len * 4,
            "recall: {} facts, {} distractors and {} questions take up to {events} tokens of {}; expected at most four fifths",
            config.facts,
            config.distractors,
            config.questions,
            config.len
        );
        generator
    }

    /// Length and make-up of the documents.
    pub fn config(&self) -> &RecallConfig {
        &self.config
    }

    /// The document of this seed: the same on every machine.
    pub fn document(&self, seed: u64) -> RecallDocument {
        let config = &self.config;
        let mut rng = Rng::of(&[seed, 0x4EC4]);
        let facts = self.draw_facts(&mut rng);
        let events = self.place(&facts, &mut rng);

        let prefix = usize::from(self.bos.is_some());
        let event_tokens: usize = events.iter().map(|e| e.tokens.len()).sum();
        let filler_tokens = config.len - prefix - event_tokens;
        let mut tokens: Vec<u32> = self.bos.into_iter().collect();
        let mut answers = Vec::new();
        let mut stated: Vec<Option<(usize, usize)>> = vec![None; facts.len()];
        let mut sentence = rng.below(self.filler.sentences.len());
        let mut filled = 0;
        for event in &events {
            // Whole sentences, except that the last one is cut where the text must end.
            let due = (event.at * filler_tokens as f64) as usize;
            self.fill(&mut tokens, &mut filled, due, filler_tokens, &mut sentence);
            let value = tokens.len() + event.value_offset;
            tokens.extend(&event.tokens);
            stated[event.fact] = match stated[event.fact] {
                None => Some((value, value)),
                Some((fact_pos, last_seen)) => {
                    let depth = fact_pos as f32 / (config.len - 1) as f32;
                    answers.push(AnswerSpan { start: value, len: facts[event.fact].value.len(), fact_pos, last_seen, depth });
                    Some((fact_pos, value))
                }
            };
        }
        self.fill(&mut tokens, &mut filled, filler_tokens, filler_tokens, &mut sentence);
        debug_assert_eq!(tokens.len(), config.len);
        RecallDocument { tokens, answers }
    }

    /// Append sentences until at least `due` of `limit` filler tokens are written.
    fn fill(&self, tokens: &mut Vec<u32>, filled: &mut usize, due: usize, limit: usize, sentence: &mut usize) {
        while *filled < due {
            let next = &self.filler.sentences[*sentence % self.filler.sentences.len()];
            let take = next.len().min(limit - *filled);
            tokens.extend(&next[..take]);
            *filled += take;
            *sentence += 1;
        }
    }

    /// Facts first, then distractors.
    fn draw_facts(&self, rng: &mut Rng) -> Vec<Fact> {
        let config = &self.config;
        let mut nouns: Vec<usize> = (0..NOUNS.len()).collect();
        rng.shuffle(&mut nouns);
        let mut keys: Vec<(usize, usize)> = Vec::new();
        (0..config.facts + config.distractors)
            .map(|i| {
                let key = loop {
                    let confusable = i >= config.facts && rng.uniform() < config.confusable as f64;
                    // Last words differ as long as there are enough of them.
                    let noun = if confusable { keys[rng.below(config.facts)].1 } else { nouns[i % nouns.len()] };
                    let key = (rng.below(ADJECTIVES.len()), noun);
                    if !keys.contains(&key) {
                        break key;
                    }
                };
                keys.push(key);
                let value = loop {
                    let kind = rng.uniform() as f32;
                    let drawn = if kind < config.digits {
                        Value { first: VALUES.len() + rng.below(100), second: None }
                    } else {
                        let second = (kind < config.digits + config.two_words).then(|| rng.below(VALUES.len()));
                        Value { first: rng.below(VALUES.len()), second }
                    };
                    if split_of(key, drawn) == config.split {
                        break drawn;
                    }
                };
                let spelled = |index: usize| if index < VALUES.len() { &self.values[index] } else { &self.digits[index - VALUES.len()] };
                let value = [Some(value.first), value.second].into_iter().flatten().flat_map(|v| spelled(v).clone()).collect();
                Fact { key: [self.adjectives[key.0].as_slice(), &self.nouns[key.1]].concat(), value }
            })
            .collect()
    }

    /// Statements and questions in the order of the text, every question after its statement.
    fn place(&self, facts: &[Fact], rng: &mut Rng) -> Vec<Event> {
        let config = &self.config;
        let stated_at: Vec<f64> = (0..facts.len())
            .map(|i| match config.placement {
                Placement::Spread { .. } => rng.uniform() * 0.6,
                Placement::Needle { depth } if i < config.facts => (depth as f64 + (rng.uniform() - 0.5) * 0.04).clamp(0.0, 0.98),
                Placement::Needle { .. } => rng.uniform() * 0.98,
            })
            .collect();
        let mut order: Vec<usize> = (0..config.facts).collect();
        rng.shuffle(&mut order);
        let mut events: Vec<Event> = Vec::new();
        for (i, fact) in facts.iter().enumerate() {
            events.push(Event::new(i, stated_at[i], fact, &self.statements[rng.below(self.statements.len())]));
        }
        for q in 0..config.questions {
            let i = order[q % order.len()];
            let at = match config.placement {
                Placement::Needle { .. } => 1.0,
                Placement::Spread { near } => {
                    let (is_near, far) = (rng.uniform() < near as f64, rng.uniform());
                    let left = 1.0 - stated_at[i];
                    stated_at[i] + if is_near { left.min(64.0 / config.len as f64) * far } else { left * far }
                }
            };
            events.push(Event::new(i, at, &facts[i], &self.questions[rng.below(self.questions.len())]));
        }
        // Stable: at the same place a statement stays before its questions.
        events.sort_by(|a, b| a.at.total_cmp(&b.at));
        events
    }
}

/// Every word of keys and values; the embedded tokenizer was trained to have each as one token.
pub fn words() -> impl Iterator<Item = &'static str> {
    ADJECTIVES.into_iter().chain(NOUNS).chain(VALUES)
}

/// Sentences that show a tokenizer's trainer the phrases and words of recall documents, every word equally often.
pub fn sample_sentences(n: usize) -> Vec<String> {
    (0..n)
        .map(|i| {
            let phrases = [STATEMENTS.as_slice(), &QUESTIONS].concat();
            let phrase = phrases[i % phrases.len()].trim_start();
            // Steps that share no factor with the lengths of the lists visit every word.
            let (adjective, noun) = (ADJECTIVES[i * 5 % ADJECTIVES.len()], NOUNS[i * 7 % NOUNS.len()]);
            format!("{phrase} {adjective} {noun} {}.", VALUES[i * 11 % VALUES.len()])
        })
        .collect()
}

#[derive(Clone, Debug)]
struct Phrase {
    before: Vec<u32>,
    after: Vec<u32>,
}

struct Fact {
    key: Vec<u32>,
    value: Vec<u32>,
}

#[derive(Clone, Copy)]
struct Value {
    /// Index into the words, or past them into the numbers.
    first: usize,
    second: Option<usize>,
}

/// A statement or question of a fact, due when this share of the filler is written.
struct Event {
    fact: usize,
    at: f64,
    tokens: Vec<u32>,
    value_offset: usize,
}

impl Event {
    fn new(fact: usize, at: f64, content: &Fact, phrase: &Phrase) -> Self {
        let value_offset = phrase.before.len() + content.key.len();
        Self { fact, at, tokens: [&phrase.before[..], &content.key, &content.value, &phrase.after].concat(), value_offset }
    }
}

/// One in five combinations is held out, decided by the combination alone.
fn split_of(key: (usize, usize), value: Value) -> Split {
    let words = [key.0 as u64, key.1 as u64, value.first as u64, value.second.map_or(u64::MAX, |v| v as u64)];
    if Rng::of(&words).below(5) == 0 { Split::Held } else { Split::Train }
}

fn max_len(words: &[Vec<u32>]) -> usize {
    words.iter().map(Vec::len).max().unwrap_or(0)
}

/// Sentences with a space in front, so that their encodings can be joined in any order.
fn sentences(text: &str) -> Vec<String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    words
        .split_inclusive(|word| word.trim_end_matches(['"', '\'', ')', '_']).ends_with(['.', '!', '?']) && word.len() > 3)
        .map(|sentence| format!(" {}", sentence.join(" ")))
        .collect()
}

const STATEMENTS: [&str; 5] = [" Remember the", " Keep in mind the", " It was written: the", " Note well the", " The record says the"];

const QUESTIONS: [&str; 4] = [" Asked for the", " Now recall the", " Question: the", " As we know, the"];

/// Words that the filler seldom has, so that a key points to one place. Three lists without a word in common.
const ADJECTIVES: [&str; 24] = [
    "silver", "golden", "purple", "yellow", "wooden", "broken", "hollow", "frozen", "ancient", "hidden", "narrow", "gentle", "clever",
    "rusty", "quiet", "crimson", "velvet", "dusty", "marble", "crystal", "polished", "painted", "foreign", "curious",
];

const NOUNS: [&str; 64] = [
    "lantern", "compass", "anchor", "mirror", "basket", "bottle", "button", "candle", "castle", "cabin", "drum", "feather", "flute",
    "fountain", "glove", "hammer", "harp", "helmet", "jar", "kettle", "kite", "ladder", "lemon", "magnet", "mask", "medal", "mill",
    "needle", "nest", "oven", "paddle", "parcel", "pebble", "pencil", "piano", "pillow", "planet", "pocket", "puzzle", "ribbon", "rope",
    "saddle", "scarf", "shovel", "statue", "sword", "tent", "ticket", "torch", "tower", "trumpet", "tunnel", "turtle", "umbrella", "vase",
    "violin", "wagon", "wallet", "whistle", "window", "wizard", "zebra", "barrel", "bridge",
];

const VALUES: [&str; 40] = [
    "copper", "tiger", "apple", "winter", "thunder", "maple", "salt", "honey", "iron", "cotton", "pepper", "sugar", "amber", "coral",
    "ivory", "olive", "cedar", "pearl", "ruby", "jade", "robin", "falcon", "otter", "badger", "rabbit", "salmon", "dragon", "raven",
    "orange", "cherry", "ginger", "walnut", "velcro", "saffron", "cinnamon", "monday", "friday", "april", "august", "october",
];

#[cfg(test)]
mod tests;
