//! One text gives the same bits however it is cut, on any number of threads, with any instructions, and after a restore.

mod support;

use sluice_engine::{Engine, EngineError, Options};
use sluice_kernels::int8_linear::InstructionSet;
use sluice_spec::{Architecture, RoutingConfig};
use support::{artifact, model, routing, tokens};

const ARCHITECTURES: [Architecture; 3] = [Architecture::Llama, Architecture::Qwen2, Architecture::Qwen3];

fn engine(architecture: Architecture, options: Options) -> Engine {
    Engine::new(artifact(&model(architecture), routing(), 32), options).unwrap()
}

fn options(threads: usize, chunk: usize) -> Options {
    Options { threads, chunk, ..Options::default() }
}

/// Logits after every token.
fn all_logits(engine: &mut Engine, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut sequence = engine.new_sequence();
    let mut all = Vec::new();
    engine.extend_with_logits(&mut sequence, tokens, |_, logits| all.push(logits.to_vec())).unwrap();
    all
}

#[test]
fn prefill_in_any_pieces_equals_decode() {
    let tokens = tokens(90);
    for architecture in ARCHITECTURES {
        let want = all_logits(&mut engine(architecture, options(1, 1)), &tokens);
        assert!(want.iter().flatten().all(|x| x.is_finite()));
        assert_ne!(want[40], want[41], "{architecture:?}: the logits do not depend on the text");
        for (threads, chunk) in [(1, 256), (2, 7), (3, 64), (2, 16)] {
            let mut engine = engine(architecture, options(threads, chunk));
            assert_eq!(all_logits(&mut engine, &tokens), want, "{architecture:?}, {threads} threads, chunks of {chunk}");
            let (mut sequence, mut done) = (engine.new_sequence(), 0);
            for piece in [1, 8, 3, 1, 1, 40, 5, 31] {
                done += piece;
                assert_eq!(engine.extend(&mut sequence, &tokens[done - piece..done]).unwrap(), want[done - 1], "after {done} tokens");
            }
            assert_eq!(done, tokens.len());
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_logits() {
    let tokens = tokens(40);
    let want = all_logits(&mut engine(Architecture::Qwen2, options(1, 16)), &tokens);
    for instructions in InstructionSet::ALL.into_iter().filter(|set| set.is_available()) {
        let got = all_logits(&mut engine(Architecture::Qwen2, Options { instructions, ..options(2, 16) }), &tokens);
        assert_eq!(got, want, "{}", instructions.name());
    }
}

#[test]
fn a_cache_holds_its_budget_and_nothing_more() {
    let mut engine = engine(Architecture::Llama, options(2, 64));
    let mut sequence = engine.new_sequence();
    let bytes = sequence.cache_bytes();
    for piece in tokens(400).chunks(50) {
        engine.extend(&mut sequence, piece).unwrap();
        for (layer, head) in [(0, 0), (1, 1)] {
            let kept = sequence.kept_positions(layer, head);
            assert!(kept.len() <= routing().cached_keys() && kept[..2] == [0, 1], "{kept:?}");
            assert_eq!(*kept.last().unwrap() as usize, sequence.position() - 1);
        }
    }
    assert_eq!((sequence.cache_bytes(), sequence.position()), (bytes, 400));
}

#[test]
fn a_restored_session_goes_on_as_if_nothing_had_happened() {
    let tokens = tokens(120);
    for architecture in ARCHITECTURES {
        let mut engine = engine(architecture, options(2, 32));
        for at in [0, 1, 8, 61, 100] {
            let mut sequence = engine.new_sequence();
            if at > 0 {
                engine.extend(&mut sequence, &tokens[..at]).unwrap();
            }
            let snapshot = sequence.snapshot();
            let mut fork = sequence.clone();
            let want = engine.extend(&mut sequence, &tokens[at..]).unwrap().to_vec();
            assert_eq!(engine.extend(&mut fork, &tokens[at..]).unwrap(), want, "fork at {at}");
            let mut restored = engine.new_sequence();
            engine.extend(&mut restored, &tokens[50..90]).unwrap();
            restored.restore(&snapshot).unwrap();
            assert_eq!(restored.position(), at);
            assert_eq!(engine.extend(&mut restored, &tokens[at..]).unwrap(), want, "restored at {at}");
            assert_eq!(restored.snapshot(), sequence.snapshot());
        }
    }
}

#[test]
fn a_damaged_or_foreign_snapshot_is_refused_and_changes_nothing() {
    let mut engine = engine(Architecture::Llama, options(1, 32));
    let mut sequence = engine.new_sequence();
    engine.extend(&mut sequence, &tokens(50)).unwrap();
    let snapshot = sequence.snapshot();
    for cut in [0, 7, 60, snapshot.len() - 1] {
        assert!(sequence.restore(&snapshot[..cut]).is_err(), "cut at {cut}");
    }
    for at in (0..snapshot.len()).step_by(97) {
        let mut damaged = snapshot.clone();
        damaged[at] ^= 4;
        assert!(sequence.restore(&damaged).is_err(), "byte {at}");
    }
    let other = RoutingConfig { top_k: 13, ..routing() };
    let foreign = Engine::new(artifact(&model(Architecture::Llama), other, 32), options(1, 32)).unwrap().new_sequence().snapshot();
    let error = sequence.restore(&foreign).unwrap_err().to_string();
    assert!(error.contains("routing"), "{error}");
    assert_eq!(sequence.snapshot(), snapshot);
}

#[test]
fn what_cannot_be_computed_is_refused_and_changes_nothing() {
    let mut engine = engine(Architecture::Llama, options(1, 32));
    let mut sequence = engine.new_sequence();
    engine.extend(&mut sequence, &[1, 2, 3]).unwrap();
    let before = sequence.snapshot();
    assert!(matches!(engine.extend(&mut sequence, &[5, 101]), Err(EngineError::Token { token: 101, place: 1, vocab_size: 101 })));
    assert_eq!(sequence.snapshot(), before);
    let mut foreign = Engine::new(artifact(&model(Architecture::Qwen3), routing(), 32), options(1, 32)).unwrap().new_sequence();
    assert!(matches!(engine.extend(&mut foreign, &[1]), Err(EngineError::Sequence)));
    let artifact = artifact(&model(Architecture::Llama), routing(), 64);
    assert!(matches!(Engine::new(artifact, options(0, 1)), Err(EngineError::Options(_))));
}
