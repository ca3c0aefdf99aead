use proptest::prelude::*;

use super::*;
use crate::embedded;

fn generator(config: RecallConfig) -> RecallGenerator {
    let tokenizer = embedded::tokenizer();
    let documents = embedded::documents();
    let prose = documents.iter().find(|d| d.domain == "prose" && d.split == config.split).unwrap();
    RecallGenerator::new(config, &tokenizer, Filler::new(&tokenizer, &[&prose.text[..60_000]]))
}

/// Combinations of key and value that a document states, as ids.
fn combinations(document: &RecallDocument, key_len: usize) -> std::collections::HashSet<Vec<u32>> {
    document.answers.iter().map(|a| document.tokens[a.fact_pos - key_len..a.fact_pos + a.len].to_vec()).collect()
}

#[test]
fn every_answer_repeats_what_its_fact_stated_after_the_same_key() {
    for config in [RecallConfig::drill(128), RecallConfig::training(512), RecallConfig::training(4096), RecallConfig::needle(2048, 0.3)] {
        let generator = generator(config);
        for seed in 0..20 {
            let document = generator.document(seed);
            assert_eq!(document.tokens.len(), config.len);
            assert_eq!(document.answers.len(), config.questions);
            for a in &document.answers {
                let at = |pos: usize| &document.tokens[pos - 2..pos + a.len];
                assert_eq!(at(a.start), at(a.fact_pos));
                assert_eq!(at(a.start), at(a.last_seen));
                assert!(a.fact_pos <= a.last_seen && a.last_seen + a.len <= a.start);
            }
        }
    }
}

#[test]
fn keys_are_unique_so_the_answer_is_determined() {
    let generator = generator(RecallConfig::training(2048));
    for seed in 0..20 {
        let document = generator.document(seed);
        for a in &document.answers {
            let key = &document.tokens[a.fact_pos - 2..a.fact_pos];
            let value = document.tokens[a.fact_pos];
            let followers: Vec<u32> = document.tokens.windows(3).filter(|w| &w[..2] == key).map(|w| w[2]).collect();
            assert!(followers.iter().all(|&f| f == value), "seed {seed}: {followers:?} after one key");
        }
    }
}

#[test]
fn training_documents_ask_densely_and_mostly_from_afar() {
    for len in [512, 1024, 4096] {
        let config = RecallConfig::training(len);
        let generator = generator(config);
        let documents: Vec<_> = (0..20).map(|seed| generator.document(seed)).collect();
        // A question is its phrase, its key and its answer: about seven tokens.
        let share = config.questions as f64 * 7.0 / len as f64;
        assert!((0.10..=0.25).contains(&share), "{len}: {share}");
        let far = documents.iter().flat_map(|d| &d.answers).filter(|a| a.start - a.fact_pos > len / 8).count();
        let all: usize = documents.iter().map(|d| d.answers.len()).sum();
        assert!((0.5..0.9).contains(&(far as f64 / all as f64)), "{len}: {far} of {all} answers are far");
    }
}

#[test]
fn drills_ask_at_least_twice_as_densely() {
    for len in [64, 128, 256, 1024] {
        let answer_tokens = |config: RecallConfig| {
            let generator = generator(config);
            (0..20).flat_map(|seed| generator.document(seed).answers).map(|a| a.len).sum::<usize>() as f64
        };
        let (drill, training) = (answer_tokens(RecallConfig::drill(len)), answer_tokens(RecallConfig::training(len)));
        assert!(drill >= 1.8 * training, "{len}: {drill} answer tokens against {training}");
    }
}

#[test]
fn needles_stand_at_their_depth_and_are_asked_once_at_the_end() {
    for depth in [0.0, 0.5, 0.9] {
        let config = RecallConfig::needle(2048, depth);
        let document = generator(config).document(7);
        for a in &document.answers {
            assert!((a.depth - depth).abs() < 0.09, "depth {} for {depth}", a.depth);
            assert_eq!(a.last_seen, a.fact_pos, "asked once");
            assert!(a.start > 2048 - 12 * config.questions);
        }
    }
}

#[test]
fn held_out_combinations_never_occur_in_training() {
    let train = generator(RecallConfig::training(1024));
    let held = generator(RecallConfig { split: Split::Held, ..RecallConfig::training(1024) });
    let collect = |g: &RecallGenerator| (0..150).flat_map(|s| combinations(&g.document(s), 2)).collect::<std::collections::HashSet<_>>();
    let (seen, unseen) = (collect(&train), collect(&held));
    assert!(seen.len() > 1000 && unseen.len() > 1000);
    assert!(seen.is_disjoint(&unseen));
}

#[test]
fn the_seed_decides_the_document() {
    let generator = generator(RecallConfig::training(512));
    assert_eq!(generator.document(3), generator.document(3));
    assert_ne!(generator.document(3).tokens, generator.document(4).tokens);
}

#[test]
#[should_panic(expected = "four fifths")]
fn more_facts_than_the_text_can_hold_are_refused() {
    generator(RecallConfig { facts: 60, questions: 60, ..RecallConfig::training(512) });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_sensible_mixture_keeps_its_promises(
        len in 300usize..1500, facts in 1usize..8, distractors in 0usize..6, repeat in 1usize..3,
        two_words in 0f32..1.0, digits in 0f32..0.5, confusable in 0f32..1.0, seed: u64,
    ) {
        let config = RecallConfig {
            facts, distractors, questions: facts * repeat, two_words, digits, confusable, ..RecallConfig::training(len)
        };
        let document = generator(config).document(seed);
        prop_assert_eq!(document.tokens.len(), len);
        prop_assert_eq!(document.answers.len(), facts * repeat);
        for a in &document.answers {
            prop_assert_eq!(&document.tokens[a.start - 2..a.start + a.len], &document.tokens[a.fact_pos - 2..a.fact_pos + a.len]);
        }
    }
}
