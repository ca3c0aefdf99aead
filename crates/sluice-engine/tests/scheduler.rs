//! Continuous batching: whoever runs beside a request, it gets the tokens that it gets alone.

mod support;

use std::collections::BTreeMap;

use sluice_engine::scheduler::{Event, FinishReason, Limits, Pass, Request, RequestId, Scheduler, SubmitError};
use sluice_engine::{Engine, Options, Sampler, SamplingConfig, Sequence};
use sluice_spec::Architecture;
use sluice_testkit::Rng;
use support::{artifact, model, routing, tokens};

fn engine(threads: usize, chunk: usize, sequences: usize) -> Engine {
    let options = Options { threads, chunk, sequences, ..Options::default() };
    Engine::new(artifact(&model(Architecture::Qwen3), routing(), 32), options).unwrap()
}

fn scheduler(threads: usize, sequences: usize, limits: Limits) -> Scheduler {
    Scheduler::new(engine(threads, 48, sequences), limits).unwrap()
}

/// What a request gets from the engine alone, token by token.
fn alone(engine: &mut Engine, request: &Request) -> (Vec<u32>, FinishReason) {
    let mut sequence = request.from.as_deref().cloned().unwrap_or_else(|| engine.new_sequence());
    let mut sampler = Sampler::new(request.sampling.clone(), engine.model().vocab_size);
    sampler.observe(&request.prompt);
    let (mut chosen, mut read) = (Vec::new(), request.prompt.clone());
    while chosen.len() < request.max_tokens {
        let token = sampler.sample(engine.extend(&mut sequence, &read).unwrap()).token;
        if request.stop_tokens.contains(&token) {
            return (chosen, FinishReason::Stop);
        }
        chosen.push(token);
        read = vec![token];
    }
    (chosen, FinishReason::Length)
}

#[derive(Default)]
struct Outcome {
    tokens: BTreeMap<(RequestId, usize), Vec<u32>>,
    finished: BTreeMap<(RequestId, usize), FinishReason>,
    states: BTreeMap<RequestId, Sequence>,
    cached: BTreeMap<RequestId, usize>,
    passes: Vec<Pass>,
}

impl Outcome {
    fn step(&mut self, scheduler: &mut Scheduler) {
        let mut events = Vec::new();
        self.passes.push(scheduler.step(&mut events).unwrap());
        for event in events {
            match event {
                Event::Started { id, cached } => assert!(self.cached.insert(id, cached).is_none()),
                Event::Token { id, choice, token, .. } => self.tokens.entry((id, choice)).or_default().push(token.token),
                Event::Kept { .. } => {}
                Event::Finished { id, choice, reason, sequence } => {
                    assert!(self.finished.insert((id, choice), reason).is_none(), "finished twice");
                    self.states.extend(sequence.map(|sequence| (id, *sequence)));
                }
            }
        }
    }

    fn run(mut self, scheduler: &mut Scheduler) -> Self {
        while !scheduler.is_idle() {
            self.step(scheduler);
        }
        self
    }
}

/// A mixture of prompts and ways to sample.
fn requests(n: usize, seed: u64) -> Vec<Request> {
    let (text, mut rng) = (tokens(400), Rng::new(seed));
    (0..n)
        .map(|i| {
            let (start, len) = (rng.below(100), 1 + rng.below(if i % 5 == 0 { 250 } else { 30 }));
            let warm = SamplingConfig { temperature: 1.0, top_k: 40, repetition_penalty: 1.2, seed: i as u64, ..SamplingConfig::default() };
            Request {
                sampling: if i % 2 == 0 { warm } else { SamplingConfig::default() },
                stop_tokens: vec![3, 50],
                ..Request::new(text[start..start + len].to_vec(), 1 + rng.below(40))
            }
        })
        .collect()
}

#[test]
fn a_request_gets_the_tokens_that_it_gets_alone() {
    for (threads, slots, prefixes) in [(1, 1, 0), (2, 3, 2), (3, 8, 4), (2, 20, 0)] {
        let requests = requests(30, slots as u64);
        let mut solo = engine(1, 16, 1);
        let mut scheduler = scheduler(threads, slots, Limits { queue: 30, prompt_tokens: 20, prefixes });
        let (mut outcome, mut ids, mut rng) = (Outcome::default(), Vec::new(), Rng::new(9));
        for request in &requests {
            ids.push(scheduler.submit(request.clone()).unwrap());
            for _ in 0..rng.below(6) {
                outcome.step(&mut scheduler);
            }
        }
        let outcome = outcome.run(&mut scheduler);
        for (id, request) in ids.iter().zip(&requests) {
            let (want, reason) = alone(&mut solo, request);
            assert_eq!(outcome.tokens.get(&(*id, 0)).cloned().unwrap_or_default(), want, "{threads} threads, {slots} slots, {id:?}");
            assert_eq!(outcome.finished[&(*id, 0)], reason);
        }
        assert_eq!(scheduler.load().slots, 0);
        let batch = outcome.passes.iter().map(|pass| pass.decoding).max().unwrap();
        assert!(batch == slots.min(batch) && (slots == 1 || batch > 1), "at most {batch} together");
        assert!(outcome.passes.iter().any(|pass| pass.evictions > 0 && pass.admissions > 0));
    }
}

#[test]
fn everyone_moves_in_every_pass_and_a_short_prompt_does_not_wait_for_a_long_one() {
    let mut scheduler = scheduler(2, 4, Limits { prompt_tokens: 16, ..Limits::default() });
    let text = tokens(380);
    let talker = scheduler.submit(Request::new(text[..4].to_vec(), 1000)).unwrap();
    let mut outcome = Outcome::default();
    outcome.step(&mut scheduler);
    let long = scheduler.submit(Request::new(text.clone(), 1)).unwrap();
    outcome.step(&mut scheduler);
    let short = scheduler.submit(Request::new(text[7..12].to_vec(), 1)).unwrap();
    outcome.step(&mut scheduler);
    assert!(outcome.finished.contains_key(&(short, 0)) && !outcome.finished.contains_key(&(long, 0)));
    while !outcome.finished.contains_key(&(long, 0)) {
        outcome.step(&mut scheduler);
    }
    assert_eq!(outcome.tokens[&(talker, 0)].len(), outcome.passes.len(), "a token in every pass");
    assert!(outcome.passes[1..].iter().all(|pass| pass.prompt_tokens <= 16 && pass.decoding == 1));
    let share: usize = outcome.passes[1..].iter().map(|pass| pass.prompt_tokens).sum();
    assert_eq!(share, 380 + 5);
}

#[test]
fn the_queue_is_bounded_and_slots_are_given_in_order() {
    let mut scheduler = scheduler(1, 2, Limits { queue: 3, prefixes: 0, ..Limits::default() });
    let request = |n| Request::new(tokens(5), n);
    let ids: Vec<RequestId> = (0..3).map(|i| scheduler.submit(request(4 + i)).unwrap()).collect();
    assert_eq!(scheduler.submit(request(1)), Err(SubmitError::Busy(3)));
    let mut outcome = Outcome::default();
    outcome.step(&mut scheduler);
    assert_eq!((scheduler.load().queued, scheduler.load().slots), (1, 2));
    assert!(scheduler.load().cache_bytes > 0);
    // Needs both slots: it waits for them, and the one behind it waits too.
    let fork = scheduler.submit(Request { choices: 2, ..request(3) }).unwrap();
    let last = scheduler.submit(request(1)).unwrap();
    while !outcome.cached.contains_key(&last) {
        outcome.step(&mut scheduler);
        assert!(!outcome.cached.contains_key(&last) || outcome.finished.contains_key(&(fork, 1)));
    }
    let outcome = outcome.run(&mut scheduler);
    assert_eq!(outcome.tokens[&(ids[2], 0)].len(), 6);
    for wrong in [
        Request::new(Vec::new(), 1),
        Request::new(vec![101], 1),
        Request { choices: 3, ..request(1) },
        Request { choices: 0, ..request(1) },
    ] {
        assert!(matches!(scheduler.submit(wrong), Err(SubmitError::Invalid(_))));
    }
}

#[test]
fn a_cancelled_request_frees_its_slots_at_once() {
    let mut scheduler = scheduler(1, 3, Limits::default());
    let mut outcome = Outcome::default();
    let long = scheduler.submit(Request::new(tokens(300), 100)).unwrap();
    let forks = scheduler.submit(Request { choices: 2, ..Request::new(tokens(5), 100) }).unwrap();
    let waiting = scheduler.submit(Request::new(tokens(5), 2)).unwrap();
    outcome.step(&mut scheduler);
    assert_eq!((scheduler.load().slots, scheduler.load().queued), (3, 1));
    scheduler.cancel(long); // while its prompt is read
    assert_eq!(scheduler.load().slots, 2);
    outcome.step(&mut scheduler);
    assert!(outcome.cached.contains_key(&waiting), "the slot was given away");
    scheduler.stop(forks, 1);
    assert_eq!(scheduler.load().slots, 2);
    scheduler.cancel(forks);
    assert_eq!(scheduler.load().slots, 1);
    let queued = scheduler.submit(Request::new(tokens(5), 2)).unwrap();
    scheduler.cancel(queued);
    assert_eq!(scheduler.load().queued, 0);
    let outcome = outcome.run(&mut scheduler);
    assert_eq!(outcome.finished.into_keys().collect::<Vec<_>>(), [(waiting, 0)]);
    assert_eq!(scheduler.load().slots, 0);
}

#[test]
fn a_prompt_that_was_read_before_is_not_read_again() {
    let text = tokens(390);
    let mut solo = engine(1, 48, 1);
    let mut scheduler = scheduler(2, 2, Limits { prefixes: 6, ..Limits::default() });
    // The same prompt; the next turn of a chat; then two that share a beginning with it.
    let first = Request::new(text[..150].to_vec(), 20);
    let (answer, _) = alone(&mut solo, &first);
    let turn = [&text[..150], &answer[..], &text[200..230]].concat();
    let branch = |from: usize| [&text[..100], &text[from..from + 60]].concat();
    let cases = [
        (first.clone(), 0),
        (first, 128),
        (Request::new(turn, 9), 169),
        (Request::new(branch(300), 9), 0),
        (Request::new(branch(320), 9), 100),
    ];
    for (request, cached) in cases {
        let id = scheduler.submit(request.clone()).unwrap();
        let outcome = Outcome::default().run(&mut scheduler);
        assert_eq!(outcome.cached[&id], cached);
        let read: usize = outcome.passes.iter().map(|pass| pass.prompt_tokens).sum();
        assert_eq!(read, request.prompt.len() - cached);
        assert_eq!(outcome.tokens[&(id, 0)], alone(&mut solo, &request).0, "{cached} tokens cached");
    }
    assert!((3..=6).contains(&scheduler.load().prefixes));
}

#[test]
fn what_one_owner_sent_makes_no_prompt_of_another_faster() {
    let text = tokens(200);
    let mut solo = engine(1, 48, 1);
    let mut scheduler = scheduler(1, 2, Limits { prefixes: 30, ..Limits::default() });
    let branch = [&text[..100], &text[150..]].concat();
    // The whole prompt, and one that shares a beginning, where a place to store would be taken from the other's.
    for (owner, prompt, cached) in [
        (1, &text[..150], 0),
        (2, &text[..150], 0),
        (1, &text[..150], 128),
        (2, &text[..150], 128),
        (3, &branch[..], 0),
        (3, &branch[..101], 0),
        (1, &branch[..], 0),
        (1, &branch[..101], 100),
    ] {
        let request = Request { owner, ..Request::new(prompt.to_vec(), 6) };
        let id = scheduler.submit(request.clone()).unwrap();
        let outcome = Outcome::default().run(&mut scheduler);
        assert_eq!(outcome.cached[&id], cached, "owner {owner}, {} tokens", prompt.len());
        let read: usize = outcome.passes.iter().map(|pass| pass.prompt_tokens).sum();
        assert_eq!(read, prompt.len() - cached);
        assert_eq!(outcome.tokens[&(id, 0)], alone(&mut solo, &request).0);
    }
}

#[test]
fn forks_read_the_prompt_once_and_differ() {
    let warm = SamplingConfig { temperature: 1.5, seed: 7, ..SamplingConfig::default() };
    let request = Request { choices: 3, sampling: warm, ..Request::new(tokens(100), 12) };
    let run = || {
        let mut scheduler = scheduler(2, 3, Limits { prefixes: 0, ..Limits::default() });
        let id = scheduler.submit(request.clone()).unwrap();
        let outcome = Outcome::default().run(&mut scheduler);
        assert_eq!(outcome.passes.iter().map(|pass| pass.prompt_tokens).sum::<usize>(), 100);
        (0..3).map(|choice| outcome.tokens[&(id, choice)].clone()).collect::<Vec<_>>()
    };
    let texts = run();
    assert_eq!(texts[0], alone(&mut engine(1, 8, 1), &request).0);
    assert!(texts[1] != texts[0] && texts[2] != texts[0] && texts[1] != texts[2] && texts.iter().all(|text| text.len() == 12));
    assert_eq!(run(), texts, "the same seed");
}

#[test]
fn a_kept_state_holds_every_token_and_goes_on_as_one_text() {
    let text = tokens(90);
    let mut scheduler = scheduler(2, 2, Limits::default());
    let first = Request { keep: true, ..Request::new(text[..60].to_vec(), 11) };
    let id = scheduler.submit(first).unwrap();
    let outcome = Outcome::default().run(&mut scheduler);
    let (answer, state) = (&outcome.tokens[&(id, 0)], &outcome.states[&id]);
    assert_eq!(state.position(), 71);
    let next = Request { from: Some(Box::new(state.clone())), ..Request::new(text[60..].to_vec(), 8) };
    let id = scheduler.submit(next).unwrap();
    let outcome = Outcome::default().run(&mut scheduler);
    let whole = [&text[..60], answer, &text[60..]].concat();
    assert_eq!(outcome.tokens[&(id, 0)], alone(&mut engine(1, 16, 1), &Request::new(whole, 8)).0);
    // Only reading: a session without an answer.
    let id = scheduler.submit(Request { keep: true, ..Request::new(text[..33].to_vec(), 0) }).unwrap();
    let outcome = Outcome::default().run(&mut scheduler);
    assert_eq!((outcome.states[&id].position(), outcome.tokens.len(), outcome.finished[&(id, 0)]), (33, 0, FinishReason::Length));
}

#[test]
fn reports_of_kept_tokens_are_those_of_the_cache() {
    let mut scheduler = scheduler(1, 1, Limits::default());
    scheduler.submit(Request { report_kept: true, ..Request::new(tokens(40), 60) }).unwrap();
    let mut reports: Vec<Vec<u16>> = Vec::new();
    while !scheduler.is_idle() {
        let mut events = Vec::new();
        scheduler.step(&mut events).unwrap();
        reports.extend(events.into_iter().filter_map(|event| if let Event::Kept { layers, .. } = event { Some(layers) } else { None }));
    }
    let mut engine = engine(1, 48, 1);
    let mut sequence = engine.new_sequence();
    engine.extend(&mut sequence, &tokens(40)).unwrap();
    assert_eq!(reports[0], sequence.layers_keeping(40));
    assert!(reports[0][..2] == [2, 2] && reports[0].contains(&0), "sinks are kept, others are not: {:?}", reports[0]);
    // One when the prompt is read, then one for each block that began: at 40, 48, .. 96.
    assert_eq!(reports.len(), 1 + 8);
    assert!(reports.windows(2).all(|pair| pair[0].iter().zip(&pair[1]).all(|(before, after)| after <= before)), "what is gone stays gone");
    assert!(reports[8].iter().sum::<u16>() < reports[0].iter().sum::<u16>());
}
