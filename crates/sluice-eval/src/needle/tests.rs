use super::*;

/// One id per byte: what goes in can be read back.
fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn text_of(tokens: &[u32]) -> String {
    String::from_utf8(tokens.iter().map(|&t| t as u8).collect()).unwrap()
}

fn filler() -> Filler {
    let text: String = (0..400).map(|i| format!(" Sentence {} tells of sea and weather.", "xvi".repeat(i % 4 + 1))).collect();
    Filler::new(&text, &bytes)
}

fn config() -> NeedleConfig {
    NeedleConfig { contexts: vec![2000, 5000], n_prompts: 3, ..NeedleConfig::default() }
}

#[test]
fn prompts_have_exactly_the_length_asked_for_and_the_fact_at_its_depth() {
    let all = prompts(&config(), &filler(), &bytes).unwrap();
    assert_eq!(all.len(), 2 * 5 * 3);
    for p in &all {
        let longest = p.answers.iter().map(|a| a.tokens.len()).max().unwrap();
        assert_eq!(p.tokens.len() + longest, p.context);
        assert_eq!(text_of(&p.tokens[p.fact_at.clone()]), p.fact);
        assert!(text_of(&p.tokens).ends_with(&p.question));
        let room = p.tokens.len() - p.question.len() - p.fact.len();
        let depth = p.fact_at.start as f64 / room as f64;
        // Distractors before or after it move the fact by their own length.
        assert!((depth - p.depth).abs() < 0.15, "depth {depth} for {}", p.depth);
    }
    assert_eq!(all.iter().find(|p| p.depth == 0.0).unwrap().fact_at.start, 0);
}

#[test]
fn facts_stand_between_sentences_and_each_value_is_planted_once() {
    for p in prompts(&config(), &filler(), &bytes).unwrap() {
        let text = text_of(&p.tokens);
        assert!(p.fact_at.start == 0 || text[..p.fact_at.start].ends_with('.') || p.depth == 1.0);
        assert_eq!(p.answers.len(), 10);
        for answer in &p.answers {
            assert_eq!(text.matches(answer.text.trim()).count(), usize::from(answer.planted), "{}", answer.text);
        }
        assert_eq!(p.answers.iter().filter(|a| a.planted).count(), 4);
        assert!(p.answers[0].planted && p.fact.contains(p.answers[0].text.trim()));
    }
}

#[test]
fn depths_share_everything_but_the_place_and_seeds_share_nothing() {
    let all = prompts(&config(), &filler(), &bytes).unwrap();
    let number = |depth: f64| all.iter().find(|p| p.depth == depth && p.context == 2000).unwrap();
    assert_eq!(number(0.0).answers, number(1.0).answers);
    assert_ne!(number(0.0).tokens, number(1.0).tokens);
    assert_eq!(prompts(&config(), &filler(), &bytes).unwrap(), all);
    let other = prompts(&NeedleConfig { seed: 1, ..config() }, &filler(), &bytes).unwrap();
    assert!(other.iter().zip(&all).all(|(a, b)| a.fact != b.fact));
}

#[test]
fn a_prefix_opens_the_prompt_and_counts() {
    let with = NeedleConfig { prefix: vec![7, 8], contexts: vec![2000], depths: vec![0.5], n_prompts: 1, ..config() };
    let p = prompts(&with, &filler(), &bytes).unwrap().remove(0);
    assert_eq!(p.tokens[..2], [7, 8]);
    assert_eq!(p.tokens.len() + p.answers[0].tokens.len(), 2000);
}

#[test]
fn what_cannot_be_built_is_said_plainly() {
    let error = |config: NeedleConfig| prompts(&config, &filler(), &bytes).unwrap_err().to_string();
    assert!(error(NeedleConfig { contexts: vec![1_000_000], ..config() }).contains("longer text"));
    assert!(error(NeedleConfig { contexts: vec![300], ..config() }).contains("300"));
    assert!(error(NeedleConfig { depths: vec![1.5], ..config() }).contains("1.5"));
    assert!(error(NeedleConfig { n_values: 50, n_digits: 1, ..config() }).contains("50 values"));
    assert!(error(NeedleConfig { n_distractors: 500, ..config() }).contains("400 keys"));
}

#[test]
fn sentences_rejoin_to_the_text_and_leave_wrapped_lines_whole() {
    let text = "It was late. \"Come!\" she\nsaid (softly.) He did.\n\nNext day\nit rained ünd schneite.";
    let pieces = sentences(text);
    assert_eq!(pieces.concat(), text);
    let expected = ["It was late.", " \"Come!\"", " she\nsaid (softly.)", " He did.", "\n\nNext day\nit rained ünd schneite."];
    assert_eq!(pieces, expected);
    let code = "let x = 1;\n".repeat(100);
    assert!(sentences(&code).iter().all(|p| p.len() < 230));
}

/// A model that has read the text perfectly, or not at all.
fn answer_like(prompt: &NeedlePrompt, nll_of_truth: f32, greedy_is_right: bool) -> Vec<Continuation> {
    let one = |a: &Answer, nll: f32| Continuation {
        nll: vec![nll; a.tokens.len()],
        top1: if greedy_is_right { a.tokens.clone() } else { vec![0; a.tokens.len()] },
    };
    prompt.answers.iter().enumerate().map(|(i, a)| one(a, if i == 0 { nll_of_truth } else { 1.0 })).collect()
}

#[test]
fn score_tells_exact_ranked_and_lost_apart() {
    let p = prompts(&config(), &filler(), &bytes).unwrap().remove(0);
    let exact = score(&p, "gate", 256, &answer_like(&p, 0.01, true));
    assert!(exact.is_exact() && exact.rank == 0 && exact.n_hits == 6);
    let lost = score(&p, "gate", 256, &answer_like(&p, 3.0, false));
    assert!(!lost.is_exact() && lost.rank == 9 && lost.n_hits == 0);
    let tie = score(&p, "gate", 256, &answer_like(&p, 1.0, false));
    assert_eq!(tie.rank, 9, "a tie is not a success");
    let broken = score(&p, "gate", 256, &answer_like(&p, f32::NAN, false));
    assert_eq!(broken.rank, 9, "a loss that is not a number is not a success");
}

#[test]
fn the_table_has_a_row_per_depth_and_one_for_all() {
    let all = prompts(&NeedleConfig { contexts: vec![2000], ..config() }, &filler(), &bytes).unwrap();
    let by_text = |tokens: &[u32]| all.iter().find(|p| p.tokens == tokens).unwrap();
    let mut dense = |tokens: &[u32], _: &[&[u32]]| Ok(answer_like(by_text(tokens), 0.1, true));
    let mut gate = |tokens: &[u32], _: &[&[u32]]| {
        let p = by_text(tokens);
        Ok(if p.depth < 0.5 { answer_like(p, 2.1, false) } else { answer_like(p, 0.1, true) })
    };
    let mut heard = 0;
    let mut scores = ask(&all, "dense", |context| context, &mut dense, &mut |n| heard = n).unwrap();
    assert_eq!(heard, 15);
    scores.extend(ask(&all, "gate", |_| 256, &mut gate, &mut |_| ()).unwrap());
    let rows = summarise(&scores, &Bootstrap::default());
    assert_eq!(rows.len(), 2 * 6);
    let find = |policy: &str, depth: Option<f64>| rows.iter().find(|r| r.policy == policy && r.depth == depth).unwrap();
    let whole = find("gate", None);
    assert_eq!((whole.kv_budget, whole.n_prompts), (256, 15));
    assert!((whole.exact_match.mean - 0.6).abs() < 1e-9 && whole.exact_match.low < 0.6 && whole.exact_match.high > 0.6);
    assert!((whole.nll_above_dense.unwrap().mean - 0.8).abs() < 1e-5, "{whole:?}");
    assert_eq!(find("gate", Some(0.0)).ranked_first.unwrap().mean, 0.0);
    assert_eq!(find("gate", Some(1.0)).token_accuracy.mean, 1.0);
    assert_eq!(find("dense", None).nll_above_dense.unwrap().mean, 0.0);
    assert_eq!(find("dense", None).kv_budget, 2000);
}
