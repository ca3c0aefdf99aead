//! One text gives the same bits however it is cut, on any number of threads, with any instructions, and after a restore.

mod support;

use sha2::{Digest, Sha256};
use sluice_engine::{Engine, EngineError, Options, Part, Sequence};
use sluice_kernels::int8_linear::InstructionSet;
use sluice_spec::{Architecture, RoutingConfig};
use sluice_testkit::Rng;
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

/// Cuts `tokens[..n]` into pieces of 1 to `longest`, seeded.
fn pieces(n: usize, longest: usize, rng: &mut Rng) -> Vec<usize> {
    let mut pieces = Vec::new();
    let mut left = n;
    while left > 0 {
        // Half of them single, as in decoding.
        let piece = if rng.below(2) == 0 { 1 } else { (1 + rng.below(longest)).min(left) };
        pieces.push(piece);
        left -= piece;
    }
    pieces
}

#[test]
fn a_sequence_in_a_batch_has_the_bits_that_it_has_alone() {
    let text = tokens(300);
    for architecture in ARCHITECTURES {
        // Each sequence reads the text from another place, so that a row of the wrong one is seen.
        let want: Vec<Vec<Vec<f32>>> =
            (0..20).map(|i| all_logits(&mut engine(architecture, options(1, 64)), &text[i..i + 40 + 2 * i])).collect();
        for (threads, chunk, sequences) in [(1, 64, 3), (2, 40, 7), (3, 64, 20), (2, 17, 17)] {
            let mut engine = engine(architecture, Options { sequences, ..options(threads, chunk) });
            let mut rng = Rng::new(threads as u64 + 10 * sequences as u64);
            let mut states: Vec<Sequence> = (0..sequences).map(|_| engine.new_sequence()).collect();
            let mut plans: Vec<Vec<usize>> = (0..sequences).map(|i| pieces(40 + 2 * i, 12, &mut rng)).collect();
            let mut checked = 0;
            while plans.iter().any(|plan| !plan.is_empty()) {
                let mut left = chunk;
                let mut members = Vec::new();
                let mut parts = Vec::new();
                for (i, state) in states.iter_mut().enumerate() {
                    // Some sit out a pass.
                    let Some(&piece) = plans[i].last().filter(|&&piece| piece <= left && rng.below(5) > 0) else { continue };
                    plans[i].pop();
                    left -= piece;
                    let at = state.position();
                    parts.push(Part { sequence: state, tokens: &text[i + at..i + at + piece], wants_logits: rng.below(4) > 0 });
                    members.push((i, at + piece));
                }
                let wanted: Vec<bool> = parts.iter().map(|part| part.wants_logits).collect();
                let logits = engine.step(&mut parts).unwrap().to_vec();
                let mut rows = logits.chunks_exact(101);
                for ((i, n), _) in members.iter().zip(wanted).filter(|(_, wanted)| *wanted) {
                    assert_eq!(rows.next().unwrap(), want[*i][n - 1], "{architecture:?}, {threads} threads, sequence {i} after {n}");
                    checked += 1;
                }
                assert!(rows.next().is_none());
            }
            assert!(checked > 10 * sequences, "only {checked} compared");
        }
    }
}

#[test]
fn a_pass_beyond_the_room_is_refused_and_changes_nothing() {
    let mut engine = engine(Architecture::Llama, Options { sequences: 2, ..options(1, 8) });
    let mut states: Vec<Sequence> = (0..3).map(|_| engine.new_sequence()).collect();
    let before = states[0].snapshot();
    fn part<'a>(sequence: &'a mut Sequence, tokens: &'a [u32]) -> Part<'a> {
        Part { sequence, tokens, wants_logits: true }
    }
    let text = tokens(9);
    let [a, b, c] = &mut states[..] else { unreachable!() };
    assert!(matches!(engine.step(&mut [part(a, &text)]), Err(EngineError::Room { tokens: 9, .. })));
    let mut three = [part(a, &text[..1]), part(b, &text[..1]), part(c, &text[..1])];
    assert!(matches!(engine.step(&mut three), Err(EngineError::Room { logits: 3, .. })));
    assert!(matches!(engine.step(&mut [part(a, &[1, 500])]), Err(EngineError::Token { token: 500, .. })));
    assert_eq!(a.snapshot(), before);
}

#[test]
fn a_cleared_sequence_and_a_copy_are_like_new_ones() {
    let text = tokens(120);
    let mut engine = engine(Architecture::Llama, options(2, 32));
    let want = all_logits(&mut engine, &text);
    let (mut used, mut copy) = (engine.new_sequence(), engine.new_sequence());
    engine.extend(&mut used, &text[30..]).unwrap();
    engine.extend(&mut copy, &text[10..]).unwrap();
    used.clear();
    assert_eq!(used.snapshot(), engine.new_sequence().snapshot());
    assert_eq!(engine.extend(&mut used, &text[..77]).unwrap(), want[76]);
    copy.copy_from(&used);
    assert_eq!(copy.snapshot(), used.snapshot());
    for sequence in [&mut used, &mut copy] {
        assert_eq!(engine.extend(sequence, &text[77..]).unwrap(), want[119]);
    }
}

#[test]
fn counts_of_kept_and_evicted_keys_agree_with_the_positions() {
    let mut engine = engine(Architecture::Llama, options(1, 32));
    let mut sequence = engine.new_sequence();
    for piece in tokens(200).chunks(19) {
        engine.extend(&mut sequence, piece).unwrap();
        let n = sequence.position();
        let kept: Vec<Vec<u32>> = (0..4).map(|i| sequence.kept_positions(i / 2, i % 2)).collect();
        let evicted: usize = kept.iter().map(|kept| n - kept.len()).sum();
        assert_eq!(sequence.evictions(), evicted as u64);
        let layers = sequence.layers_keeping(n);
        for position in 0..n {
            let holds = |layer: usize| (0..2).any(|head| kept[2 * layer + head].contains(&(position as u32)));
            assert_eq!(layers[position] as usize, usize::from(holds(0)) + usize::from(holds(1)), "position {position} of {n}");
        }
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

/// A digest proves no good will: whoever sends a snapshot can compute it.
#[test]
fn a_forged_snapshot_is_refused() {
    let mut engine = engine(Architecture::Llama, options(1, 32));
    let mut sequence = engine.new_sequence();
    engine.extend(&mut sequence, &tokens(50)).unwrap();
    let snapshot = sequence.snapshot();
    let forged = |at: usize, bytes: &[u8]| {
        let mut forged = snapshot[..snapshot.len() - 32].to_vec();
        forged[at..at + bytes.len()].copy_from_slice(bytes);
        let digest = Sha256::digest(&forged);
        forged.extend(digest);
        forged
    };
    // Magic 8, fingerprint 32, position 8, then slots, start and length of the strip, admissions, positions of the slots.
    let word = |at: usize| u64::from_le_bytes(snapshot[at..at + 8].try_into().unwrap());
    assert_eq!((word(40), word(48), word(56), word(64)), (50, 12, 40, 10), "the layout that this test forges");
    assert_eq!(sequence.clone().restore(&forged(40, &50u64.to_le_bytes())), Ok(()), "nothing changed");
    let keys = 80 + 12 * 8;
    for (what, at, bytes) in [
        ("a position without its strip", 40, &51u64.to_le_bytes()[..]),
        ("a position beyond all", 40, &u64::MAX.to_le_bytes()),
        ("fewer slots", 48, &11u64.to_le_bytes()),
        ("more slots", 48, &u64::MAX.to_le_bytes()),
        ("an earlier strip", 56, &39u64.to_le_bytes()),
        ("a longer strip", 64, &11u64.to_le_bytes()),
        ("a slot from the future", 80, &40u32.to_le_bytes()),
        ("a key that is infinite", keys, &0x7c00u16.to_le_bytes()),
        ("a key that is no number", keys, &0xfe01u16.to_le_bytes()),
    ] {
        assert!(sequence.restore(&forged(at, bytes)).is_err(), "{what}");
    }
    assert_eq!(sequence.snapshot(), snapshot);
}
