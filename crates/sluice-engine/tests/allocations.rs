//! Decoding allocates nothing, on no thread: the whole test binary counts its allocations, so it holds one test.

mod support;

use std::alloc::System;

use sluice_engine::{Engine, Options, Part, Sampler, SamplingConfig};
use sluice_spec::Architecture;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use support::{artifact, model, routing, tokens};

#[global_allocator]
static COUNTED: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

#[test]
fn a_decode_step_allocates_nothing() {
    let options = Options { threads: 2, chunk: 16, sequences: 3, ..Options::default() };
    let mut engine = Engine::new(artifact(&model(Architecture::Qwen2), routing(), 32), options).unwrap();
    let mut sequence = engine.new_sequence();
    let warm = SamplingConfig { temperature: 0.8, top_k: 20, top_p: 0.9, repetition_penalty: 1.1, ..SamplingConfig::default() };
    let mut sampler = Sampler::new(warm, engine.model().vocab_size);
    let mut next = sampler.sample(engine.extend(&mut sequence, &tokens(30)).unwrap()).token;
    // The standard library allocates when a thread goes to sleep for the first time; and so does the test's own start.
    std::thread::sleep(std::time::Duration::from_millis(100));
    next = sampler.sample(engine.extend(&mut sequence, &[next]).unwrap()).token;
    let before = COUNTED.stats();
    // Many blocks: admissions and evictions happen on the way.
    for _ in 0..100 {
        next = sampler.sample(engine.extend(&mut sequence, &[next]).unwrap()).token;
    }
    let after = COUNTED.stats();
    assert_eq!((after.allocations, after.reallocations), (before.allocations, before.reallocations));
    // So it is with several sequences, one of which reads a prompt.
    let mut states = [(); 3].map(|()| engine.new_sequence());
    let mut samplers = [(); 3].map(|()| Sampler::new(SamplingConfig::default(), engine.model().vocab_size));
    let (prompt, mut chosen) = (tokens(200), [7; 3]);
    let before = COUNTED.stats();
    for i in 0..20 {
        let [a, b, c] = &mut states;
        let part = |sequence, tokens, wants_logits| Part { sequence, tokens, wants_logits };
        let (x, y) = ([chosen[0]], [chosen[1]]);
        let parts = &mut [part(a, &x, true), part(b, &y, true), part(c, &prompt[i * 10..(i + 1) * 10], i == 19)];
        for (i, logits) in engine.step(parts).unwrap().chunks_exact(101).enumerate() {
            chosen[i] = samplers[i].sample(logits).token;
        }
    }
    let after = COUNTED.stats();
    assert_eq!((after.allocations, after.reallocations), (before.allocations, before.reallocations));
    // The counter works.
    drop(sequence.clone());
    assert!(COUNTED.stats().allocations > after.allocations);
}
