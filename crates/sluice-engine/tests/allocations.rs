//! Decoding allocates nothing, on no thread: the whole test binary counts its allocations, so it holds one test.

mod support;

use std::alloc::System;

use sluice_engine::{Engine, Options, Sampler, SamplingConfig};
use sluice_spec::Architecture;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use support::{artifact, model, routing, tokens};

#[global_allocator]
static COUNTED: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

#[test]
fn a_decode_step_allocates_nothing() {
    let options = Options { threads: 2, chunk: 16, ..Options::default() };
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
    // The counter works.
    drop(sequence.clone());
    assert!(COUNTED.stats().allocations > after.allocations);
}
