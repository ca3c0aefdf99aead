//! States of texts that were read before, so that the next prompt that begins with one need not read it again.
//!
//! A state in a bounded cache cannot be cut back, so it helps only prompts that begin with all of its text. Hence three
//! places to take one: near the end of a prompt (for the same prompt), at the end of an answer (for the next turn of a
//! chat), and where a prompt turns out to part from an earlier one (for the third that shares a beginning with both).
//!
//! Every state belongs to an owner and is invisible to others, or the time to a first token would tell what they have sent. They
//! share the room: who sends much makes others' states leave, which tells that he does, not what.

use crate::sequence::Sequence;

/// Shorter beginnings are read again.
pub(super) const SHORTEST: usize = 32;

/// The stored states, at most `capacity`, the least recently used one leaves first.
pub(super) struct Prefixes {
    capacity: usize,
    /// Least recently used first.
    entries: Vec<Entry>,
}

struct Entry {
    owner: u64,
    tokens: Vec<u32>,
    sequence: Sequence,
}

impl Prefixes {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, entries: Vec::with_capacity(capacity) }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The longest stored state of a beginning of `prompt` that leaves at least its last token to read.
    pub(super) fn longest(&mut self, owner: u64, prompt: &[u32]) -> Option<&Sequence> {
        let fits = |entry: &Entry| entry.owner == owner && entry.tokens.len() < prompt.len() && prompt.starts_with(&entry.tokens);
        let (at, _) = self.entries.iter().enumerate().filter(|(_, entry)| fits(entry)).max_by_key(|(_, entry)| entry.tokens.len())?;
        let entry = self.entries.remove(at);
        self.entries.push(entry);
        self.entries.last().map(|entry| &entry.sequence)
    }

    /// Where `prompt` should be stored while it is read, ascending, all of them between `read` and its last token.
    pub(super) fn places(&self, owner: u64, prompt: &[u32], read: usize) -> Vec<usize> {
        if self.capacity == 0 {
            return Vec::new();
        }
        let shared = |entry: &Entry| entry.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let parting = self.entries.iter().filter(|entry| entry.owner == owner).map(shared).max().unwrap_or(0).min(prompt.len() - 1);
        // Whole blocks of the most usual router, so that the rest is read at once.
        let end = (prompt.len() - 1) / SHORTEST * SHORTEST;
        let mut places: Vec<usize> = [parting, end].into_iter().filter(|&place| place >= SHORTEST && place > read).collect();
        places.sort_unstable();
        places.dedup();
        places
    }

    /// Store the state after `tokens`.
    pub(super) fn store(&mut self, owner: u64, tokens: &[u32], sequence: &Sequence) {
        if self.capacity == 0 || tokens.len() < SHORTEST {
            return;
        }
        if let Some(at) = self.entries.iter().position(|entry| entry.owner == owner && entry.tokens == tokens) {
            let entry = self.entries.remove(at);
            self.entries.push(entry);
            return;
        }
        if self.entries.len() < self.capacity {
            self.entries.push(Entry { owner, tokens: tokens.to_vec(), sequence: sequence.clone() });
            return;
        }
        let mut entry = self.entries.remove(0);
        entry.owner = owner;
        entry.tokens.clear();
        entry.tokens.extend_from_slice(tokens);
        entry.sequence.copy_from(sequence);
        self.entries.push(entry);
    }
}
