//! Continuous batching: requests wait in a bounded queue, get slots in the order of their arrival, and from then on every
//! pass over the model continues all of them, single tokens and pieces of prompts together.
//!
//! Nothing here looks at a clock or a thread: [`Scheduler::step`] makes one pass and tells what happened. A request gets
//! the same tokens whatever runs beside it.
//!
//! *Fair*: whoever decodes gets a token in every pass; prompts share what is left of a pass in equal pieces, so that a short
//! one is not held up by a long one; slots are given in the order of arrival.

mod prefixes;
mod request;

use std::collections::VecDeque;

pub use request::{Event, FinishReason, Request, RequestId, SubmitError};

use crate::engine::{Engine, EngineError};
use crate::forward::Part;
use crate::sampling::{Sampler, SamplingConfig};
use crate::sequence::Sequence;
use prefixes::Prefixes;

/// How much the scheduler takes on.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests that may wait.
    pub queue: usize,
    /// Prompt tokens in a pass in which others decode: more reads prompts faster and makes the others wait longer.
    pub prompt_tokens: usize,
    /// Stored states of earlier prompts, each as large as a sequence; 0 stores none.
    pub prefixes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { queue: 64, prompt_tokens: 64, prefixes: 8 }
    }
}

/// What one pass computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Tokens of prompts.
    pub prompt_tokens: usize,
    /// Sequences that went on by a token of their own.
    pub decoding: usize,
    /// Keys that were admitted to slots, over all layers and KV heads.
    pub admissions: u64,
    /// Keys that were let go.
    pub evictions: u64,
}

/// What is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Requests that wait for slots.
    pub queued: usize,
    /// Slots in use.
    pub slots: usize,
    /// Bytes of keys and values of the slots in use.
    pub cache_bytes: usize,
    /// Stored states of earlier prompts.
    pub prefixes: usize,
}

/// An engine and the requests that it works on.
pub struct Scheduler {
    engine: Engine,
    limits: Limits,
    next_id: u64,
    queue: VecDeque<(RequestId, Request)>,
    running: Vec<Running>,
    /// Slots that nobody uses.
    free: Vec<Sequence>,
    prefixes: Prefixes,
    /// Whose prompt is first in the next pass.
    turn: usize,
}

/// A request with slots.
struct Running {
    id: RequestId,
    request: Request,
    /// Tokens that its session had read before.
    start: usize,
    /// Tokens of the prompt that were read.
    read: usize,
    /// Where the state is stored while the prompt is read, ascending.
    places: Vec<usize>,
    /// While the prompt is read there is one, afterwards those that are not complete.
    slots: Vec<Slot>,
    /// Free sequences that are spoken for by the continuations to come.
    reserved: Vec<Sequence>,
}

/// One continuation.
struct Slot {
    choice: usize,
    sequence: Sequence,
    sampler: Sampler,
    /// Tokens chosen so far; all but the last one are read.
    chosen: Vec<u32>,
    /// It is complete but for reading its last token.
    closing: bool,
    /// It is complete.
    done: Option<FinishReason>,
    /// Tokens in the pass being made: of the prompt, or one of its own.
    share: usize,
}

impl Scheduler {
    /// A scheduler with a slot for each sequence that the engine can choose tokens for. All slots are allocated here.
    pub fn new(engine: Engine, limits: Limits) -> Result<Self, EngineError> {
        let slots = engine.sequences();
        if slots > engine.chunk() || limits.prompt_tokens == 0 {
            let found = format!("{slots} sequences, passes of {} tokens, {} of a prompt", engine.chunk(), limits.prompt_tokens);
            return Err(EngineError::Options(format!("{found}; expected room for a token of each sequence, and of a prompt")));
        }
        let free = (0..slots).map(|_| engine.new_sequence()).collect();
        let prefixes = Prefixes::new(limits.prefixes);
        Ok(Self { engine, limits, next_id: 0, queue: VecDeque::new(), running: Vec::new(), free, prefixes, turn: 0 })
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running.is_empty()
    }

    /// What is going on.
    pub fn load(&self) -> Load {
        let slots = self.engine.sequences() - self.free.len();
        let bytes = self.free.iter().chain(self.running.iter().flat_map(|r| &r.reserved)).next().map(Sequence::cache_bytes);
        let bytes = bytes.or_else(|| self.running.iter().flat_map(|r| &r.slots).next().map(|slot| slot.sequence.cache_bytes()));
        Load { queued: self.queue.len(), slots, cache_bytes: slots * bytes.unwrap_or(0), prefixes: self.prefixes.len() }
    }

    /// Take a request into the queue.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, SubmitError> {
        let invalid = |what: String| Err(SubmitError::Invalid(what));
        let (slots, vocab_size) = (self.engine.sequences(), self.engine.model().vocab_size);
        if request.prompt.is_empty() {
            return invalid("the prompt has no tokens; expected at least one".into());
        }
        if let Some(token) = request.prompt.iter().find(|&&token| token as usize >= vocab_size) {
            return invalid(format!("token {token}; expected ids below {vocab_size}"));
        }
        if request.choices == 0 || request.choices > slots {
            return invalid(format!("{} continuations; expected 1 to {slots}", request.choices));
        }
        if request.from.as_ref().is_some_and(|from| !from.fits(self.engine.model(), self.engine.routing())) {
            return invalid("a session of another model or routing".into());
        }
        if self.queue.len() >= self.limits.queue {
            return Err(SubmitError::Busy(self.queue.len()));
        }
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.queue.push_back((id, request));
        Ok(id)
    }

    /// Drop a request, waiting or running; its slots are free at once and nothing more is told about it.
    pub fn cancel(&mut self, id: RequestId) {
        self.queue.retain(|(queued, _)| *queued != id);
        if let Some(at) = self.running.iter().position(|running| running.id == id) {
            let running = self.running.remove(at);
            self.free.extend(running.slots.into_iter().map(|slot| slot.sequence).chain(running.reserved));
        }
    }

    /// End one continuation of a request; its slot is free at once and nothing more is told about it.
    pub fn stop(&mut self, id: RequestId, choice: usize) {
        let Some(running) = self.running.iter_mut().find(|running| running.id == id) else { return };
        // Before the prompt is read there is one slot for all continuations.
        if running.is_reading() {
            return;
        }
        if let Some(at) = running.slots.iter().position(|slot| slot.choice == choice) {
            self.free.push(running.slots.remove(at).sequence);
        }
        self.running.retain(|running| !running.slots.is_empty());
    }

    /// Give free slots to those who wait and make one pass over everything that runs; what happened goes into `events`.
    pub fn step(&mut self, events: &mut Vec<Event>) -> Result<Pass, EngineError> {
        self.admit(events);
        self.share_out();
        let pass = self.compute(events)?;
        self.release(events);
        Ok(pass)
    }

    /// Slots in the order of arrival: who needs several waits for all of them, and nobody overtakes.
    fn admit(&mut self, events: &mut Vec<Event>) {
        while self.queue.front().is_some_and(|(_, request)| request.choices <= self.free.len()) {
            let Some((id, mut request)) = self.queue.pop_front() else { return };
            let mut reserved = self.free.split_off(self.free.len() - request.choices);
            let mut sequence = reserved.pop().expect("a request has at least one choice");
            let (mut start, mut read, mut places) = (0, 0, Vec::new());
            if let Some(from) = request.from.take() {
                sequence.copy_from(&from);
                start = from.position();
            } else {
                match self.prefixes.longest(request.owner, &request.prompt) {
                    Some(stored) => sequence.copy_from(stored),
                    None => sequence.clear(),
                }
                read = sequence.position();
                places = self.prefixes.places(request.owner, &request.prompt, read);
            }
            let mut sampler = Sampler::new(request.sampling.clone(), self.engine.model().vocab_size);
            sampler.observe(&request.prompt);
            let slot = Slot { choice: 0, sequence, sampler, chosen: Vec::new(), closing: false, done: None, share: 0 };
            self.running.push(Running { id, request, start, read, places, slots: vec![slot], reserved });
            events.push(Event::Started { id, cached: read });
        }
    }

    /// Decide how many tokens each sequence has in the next pass.
    fn share_out(&mut self) {
        let mut decoding = 0;
        for slot in self.running.iter_mut().filter(|running| !running.is_reading()).flat_map(|running| &mut running.slots) {
            slot.share = 1;
            decoding += 1;
        }
        let room = self.engine.chunk() - decoding;
        let mut left = if decoding > 0 { room.min(self.limits.prompt_tokens) } else { room };
        let n = self.running.len();
        let turns: Vec<usize> = (0..n).map(|i| (self.turn + i) % n).filter(|&i| self.running[i].is_reading()).collect();
        for &i in &turns {
            self.running[i].slots[0].share = 0;
        }
        // Equal pieces; what the short prompts leave goes to the others.
        loop {
            let hungry = turns.iter().filter(|&&i| self.running[i].hunger() > 0).count();
            if hungry == 0 || left == 0 {
                break;
            }
            let piece = (left / hungry).max(1);
            for &i in &turns {
                let more = self.running[i].hunger().min(piece).min(left);
                self.running[i].slots[0].share += more;
                left -= more;
            }
        }
        self.turn = self.turn.wrapping_add(1) % n.max(1);
    }

    /// The pass itself, and the choice of a token for every sequence that has one to choose.
    fn compute(&mut self, events: &mut Vec<Event>) -> Result<Pass, EngineError> {
        let Self { engine, running, prefixes, .. } = self;
        let counts = |running: &[Running]| {
            let sequences = running.iter().flat_map(|r| &r.slots).map(|slot| &slot.sequence);
            sequences.fold((0, 0), |(a, e), sequence| (a + sequence.admissions(), e + sequence.evictions()))
        };
        let before = counts(running);
        let mut parts = Vec::with_capacity(running.len());
        for running in running.iter_mut() {
            let (request, read, reading) = (&running.request, running.read, running.is_reading());
            for slot in running.slots.iter_mut().filter(|slot| slot.share > 0) {
                let (tokens, wants_logits) = if reading {
                    let end = read + slot.share;
                    (&request.prompt[read..end], end == request.prompt.len() && request.max_tokens > 0)
                } else {
                    (&slot.chosen[slot.chosen.len() - 1..], !slot.closing)
                };
                parts.push(Part { sequence: &mut slot.sequence, tokens, wants_logits });
            }
        }
        if parts.is_empty() {
            return Ok(Pass::default());
        }
        let (vocab_size, route_every) = (engine.model().vocab_size, engine.routing().route_every);
        let mut logits = engine.step(&mut parts)?.chunks_exact(vocab_size);
        let after = counts(running);
        let mut pass = Pass { admissions: after.0 - before.0, evictions: after.1 - before.1, ..Pass::default() };
        for running in running.iter_mut() {
            if running.is_reading() {
                pass.prompt_tokens += running.slots[0].share;
                running.advance_prompt(&mut logits, prefixes, events);
            } else {
                pass.decoding += running.slots.len();
                running.advance_slots(&mut logits, route_every, events);
            }
        }
        Ok(pass)
    }

    /// Free the slots of what is complete, and tell of it.
    fn release(&mut self, events: &mut Vec<Event>) {
        for running in &mut self.running {
            while let Some(at) = running.slots.iter().position(|slot| slot.done.is_some()) {
                let slot = running.slots.remove(at);
                let Some(reason) = slot.done else { continue };
                if running.start == 0 {
                    let mut text = running.request.prompt.clone();
                    text.extend_from_slice(&slot.chosen[..slot.sequence.position() - text.len()]);
                    self.prefixes.store(running.request.owner, &text, &slot.sequence);
                }
                let sequence = running.request.keep.then(|| Box::new(slot.sequence.clone()));
                events.push(Event::Finished { id: running.id, choice: slot.choice, reason, sequence });
                self.free.push(slot.sequence);
            }
        }
        self.running.retain(|running| !running.slots.is_empty());
    }
}

impl Running {
    fn is_reading(&self) -> bool {
        self.read < self.request.prompt.len()
    }

    /// Prompt tokens that the next pass could take beyond its share: up to where the state is to be stored.
    fn hunger(&self) -> usize {
        let end = self.places.first().copied().unwrap_or(self.request.prompt.len());
        end - self.read - self.slots[0].share
    }

    /// A piece of the prompt was read. At its end the continuations begin, each from a copy of the state.
    fn advance_prompt(&mut self, logits: &mut std::slice::ChunksExact<'_, f32>, prefixes: &mut Prefixes, events: &mut Vec<Event>) {
        let slot = &mut self.slots[0];
        self.read += slot.share;
        if self.places.first() == Some(&self.read) {
            self.places.remove(0);
            prefixes.store(self.request.owner, &self.request.prompt[..self.read], &slot.sequence);
        }
        if self.is_reading() {
            return;
        }
        for (i, mut sequence) in self.reserved.drain(..).enumerate() {
            sequence.copy_from(&self.slots[0].sequence);
            let config = &self.request.sampling;
            let seed = config.seed ^ (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let mut sampler = Sampler::new(SamplingConfig { seed, ..config.clone() }, self.slots[0].sampler.vocab_size());
            sampler.observe(&self.request.prompt);
            self.slots.push(Slot { choice: i + 1, sequence, sampler, chosen: Vec::new(), closing: false, done: None, share: 0 });
        }
        let first = if self.request.max_tokens > 0 { logits.next() } else { None };
        for slot in &mut self.slots {
            if self.request.report_kept {
                slot.report_kept(self.id, self.start + self.request.prompt.len(), events);
            }
            match first {
                Some(logits) => slot.choose(self.id, &self.request, logits, events),
                None => slot.done = Some(FinishReason::Length),
            }
        }
    }

    /// Every continuation has read the token that was chosen last.
    fn advance_slots(&mut self, logits: &mut std::slice::ChunksExact<'_, f32>, route_every: usize, events: &mut Vec<Event>) {
        for slot in &mut self.slots {
            // The router has just decided.
            if self.request.report_kept && (slot.sequence.position() - 1).is_multiple_of(route_every) {
                slot.report_kept(self.id, self.start + self.request.prompt.len(), events);
            }
            if slot.closing {
                slot.done = Some(FinishReason::Length);
            } else {
                slot.choose(self.id, &self.request, logits.next().expect("logits of each sequence that goes on"), events);
            }
        }
    }
}

impl Slot {
    fn choose(&mut self, id: RequestId, request: &Request, logits: &[f32], events: &mut Vec<Event>) {
        let token = self.sampler.sample(logits);
        if request.stop_tokens.contains(&token.token) {
            self.done = Some(FinishReason::Stop);
            return;
        }
        self.chosen.push(token.token);
        let top = self.sampler.most_likely(request.top_logprobs);
        events.push(Event::Token { id, choice: self.choice, token, top });
        if self.chosen.len() == request.max_tokens {
            // Whoever goes on from the state must find the last token in it.
            self.closing = request.keep;
            self.done = (!request.keep).then_some(FinishReason::Length);
        }
    }

    fn report_kept(&self, id: RequestId, n: usize, events: &mut Vec<Event>) {
        events.push(Event::Kept { id, choice: self.choice, layers: self.sequence.layers_keeping(n) });
    }
}
