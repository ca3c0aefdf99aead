//! The engine's own thread. HTTP talks to it through channels that never block: commands go in, updates of each request come
//! out. Text is made here, since a stop string must end an answer before the next pass; nothing here knows HTTP.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use sluice_data::{StreamDecoder, Tokenizer};
use sluice_engine::scheduler::{Event, FinishReason, Request, RequestId, Scheduler, SubmitError};
use sluice_engine::{Choice, Sequence};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::metrics::Metrics;
use crate::stop::StopWatch;

/// What happens to a request, in order.
pub(crate) enum Update {
    /// It is being computed.
    Started {
        /// Prompt tokens that a stored prefix saved.
        cached: usize,
    },
    /// A token, and the text that became certain with it.
    Token { choice: usize, text: String, token: Choice, top: Vec<Choice> },
    /// Layers that keep each token of the prompt.
    Kept { choice: usize, layers: Vec<u16> },
    /// An answer is complete; `text` is what was held back.
    Finished { choice: usize, text: String, reason: FinishReason, sequence: Option<Box<Sequence>> },
    /// The engine refused it.
    Refused(SubmitError),
}

enum Command {
    Submit(Box<Work>),
    Cancel(u64),
}

struct Work {
    ticket: u64,
    request: Request,
    stops: Vec<String>,
    updates: UnboundedSender<Update>,
    submitted: Instant,
}

/// The HTTP side's hold on the engine's thread.
pub(crate) struct Worker {
    commands: Sender<Command>,
    shared: Arc<Shared>,
    next_ticket: AtomicU64,
    /// Slots that running and waiting requests may ask for in all.
    capacity: usize,
}

struct Shared {
    asked: AtomicUsize,
    alive: AtomicBool,
    metrics: Arc<Metrics>,
}

/// Too many requests, or no engine any more.
pub(crate) enum SubmitFailure {
    Busy,
    Dead,
}

impl Worker {
    /// Start the thread. It ends when the worker and all jobs are dropped.
    pub(crate) fn start(scheduler: Scheduler, tokenizer: Arc<Tokenizer>, metrics: Arc<Metrics>, queue: usize) -> (Self, JoinHandle<()>) {
        let (commands, receiver) = channel();
        let capacity = scheduler.engine().sequences() + queue;
        let shared = Arc::new(Shared { asked: AtomicUsize::new(0), alive: AtomicBool::new(true), metrics });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
            // Dropped in a panic too: whoever asks then learns that nobody computes any more.
            let _alive = Alive(&own);
            Loop { scheduler, tokenizer: &tokenizer, metrics: &own.metrics, jobs: HashMap::new(), tickets: HashMap::new() }.run(&receiver);
        });
        let thread = thread.expect("the system gives a thread");
        (Self { commands, shared, next_ticket: AtomicU64::new(0), capacity }, thread)
    }

    /// Whether the engine's thread runs.
    pub(crate) fn is_alive(&self) -> bool {
        self.shared.alive.load(Ordering::SeqCst)
    }

    /// Hand a request over; never waits.
    pub(crate) fn submit(&self, request: Request, stops: Vec<String>) -> Result<Job, SubmitFailure> {
        let slots = request.choices;
        let fits = |asked: usize| (asked + slots <= self.capacity).then_some(asked + slots);
        if self.shared.asked.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fits).is_err() {
            self.shared.metrics.refused.inc();
            return Err(SubmitFailure::Busy);
        }
        let (updates, receiver) = unbounded_channel();
        let ticket = self.next_ticket.fetch_add(1, Ordering::Relaxed);
        let job =
            Job { ticket, slots, running: slots, updates: receiver, commands: self.commands.clone(), shared: Arc::clone(&self.shared) };
        let work = Box::new(Work { ticket, request, stops, updates, submitted: Instant::now() });
        self.commands.send(Command::Submit(work)).map_err(|_| SubmitFailure::Dead)?;
        Ok(job)
    }
}

struct Alive<'a>(&'a Shared);

impl Drop for Alive<'_> {
    fn drop(&mut self) {
        self.0.alive.store(false, Ordering::SeqCst);
    }
}

/// A request that was handed over. Dropping it before its end cancels it: its slots are free before the next pass.
pub(crate) struct Job {
    ticket: u64,
    slots: usize,
    /// Continuations that are not complete.
    running: usize,
    pub(crate) updates: UnboundedReceiver<Update>,
    commands: Sender<Command>,
    shared: Arc<Shared>,
}

impl Job {
    /// Note that a continuation is complete; true after the last one.
    pub(crate) fn finish_one(&mut self) -> bool {
        self.running = self.running.saturating_sub(1);
        self.running == 0
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if self.running > 0 {
            // Without a thread there is nothing to cancel.
            let _ = self.commands.send(Command::Cancel(self.ticket));
        }
        self.shared.asked.fetch_sub(self.slots, Ordering::SeqCst);
    }
}

/// State of the thread.
struct Loop<'a> {
    scheduler: Scheduler,
    tokenizer: &'a Tokenizer,
    metrics: &'a Metrics,
    jobs: HashMap<RequestId, Running<'a>>,
    tickets: HashMap<u64, RequestId>,
}

struct Running<'a> {
    ticket: u64,
    updates: UnboundedSender<Update>,
    stops: Vec<String>,
    submitted: Instant,
    /// Text of each continuation; none when it is complete.
    texts: Vec<Option<Text<'a>>>,
}

struct Text<'a> {
    decoder: StreamDecoder<'a>,
    watch: StopWatch,
    last_token: Option<Instant>,
}

impl Loop<'_> {
    fn run(mut self, commands: &Receiver<Command>) {
        let mut events = Vec::new();
        loop {
            if self.scheduler.is_idle() {
                match commands.recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => return,
                }
            }
            while let Ok(command) = commands.try_recv() {
                self.obey(command);
            }
            let started = Instant::now();
            // Requests are checked when they are submitted, so this is a fault of ours: end loudly, not wrongly.
            let pass = self.scheduler.step(&mut events).expect("a pass over checked requests");
            if pass.prompt_tokens + pass.decoding > 0 {
                self.metrics.pass_seconds.observe(started.elapsed().as_secs_f64());
                self.metrics.prompt_tokens.inc_by(pass.prompt_tokens as u64);
                self.metrics.admissions.inc_by(pass.admissions);
                self.metrics.evictions.inc_by(pass.evictions);
            }
            if pass.decoding > 0 {
                self.metrics.batch.observe(pass.decoding as f64);
            }
            // Before anyone hears of an end, so that who has heard of it sees its slot free; and after, since a stop string ends answers too.
            self.report_load();
            for event in events.drain(..) {
                self.tell(event);
            }
            self.report_load();
        }
    }

    fn report_load(&self) {
        let load = self.scheduler.load();
        self.metrics.queued.set(load.queued as i64);
        self.metrics.slots.set(load.slots as i64);
        self.metrics.cache_bytes.set(load.cache_bytes as i64);
        self.metrics.prefixes.set(load.prefixes as i64);
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(work) => {
                let Work { ticket, request, stops, updates, submitted } = *work;
                let choices = request.choices;
                match self.scheduler.submit(request) {
                    Ok(id) => {
                        let text = || Text { decoder: self.tokenizer.stream(), watch: StopWatch::new(stops.clone()), last_token: None };
                        let texts = (0..choices).map(|_| Some(text())).collect();
                        self.tickets.insert(ticket, id);
                        self.jobs.insert(id, Running { ticket, updates, stops, submitted, texts });
                    }
                    // Whoever asked may be gone; that is the end of it either way.
                    Err(error) => drop(updates.send(Update::Refused(error))),
                }
            }
            Command::Cancel(ticket) => {
                if let Some(id) = self.tickets.get(&ticket).copied() {
                    self.drop_job(id);
                }
            }
        }
    }

    fn drop_job(&mut self, id: RequestId) {
        self.scheduler.cancel(id);
        if let Some(running) = self.jobs.remove(&id) {
            self.tickets.remove(&running.ticket);
            self.metrics.cancelled.inc();
        }
    }

    fn tell(&mut self, event: Event) {
        let (Event::Started { id, .. } | Event::Token { id, .. } | Event::Kept { id, .. } | Event::Finished { id, .. }) = event;
        // Not there: cancelled, or stopped, earlier in this batch of events.
        let Some(running) = self.jobs.get_mut(&id) else { return };
        let mut stopped = None;
        let sent = match event {
            Event::Started { cached, .. } => {
                self.metrics.cached_tokens.inc_by(cached as u64);
                running.updates.send(Update::Started { cached })
            }
            Event::Kept { choice, layers, .. } => running.updates.send(Update::Kept { choice, layers }),
            Event::Token { choice, token, top, .. } => {
                let Some(text) = running.texts[choice].as_mut() else { return };
                let now = Instant::now();
                match text.last_token.replace(now) {
                    Some(last) => self.metrics.next_token_seconds.observe((now - last).as_secs_f64()),
                    None => self.metrics.first_token_seconds.observe((now - running.submitted).as_secs_f64()),
                }
                self.metrics.generated_tokens.inc();
                let piece = text.decoder.push(token.token);
                let (shown, hit) = if running.stops.is_empty() { (piece, false) } else { text.watch.push(&piece) };
                stopped = hit.then_some(choice);
                running.updates.send(Update::Token { choice, text: shown, token, top })
            }
            Event::Finished { choice, reason, sequence, .. } => match running.texts[choice].take() {
                Some(text) => running.finish(choice, text, reason, sequence),
                None => Ok(()),
            },
        };
        if sent.is_err() {
            self.drop_job(id);
            return;
        }
        if let Some(choice) = stopped {
            running.texts[choice] = None;
            let finished = Update::Finished { choice, text: String::new(), reason: FinishReason::Stop, sequence: None };
            // A client that is gone is noticed below: nothing is left to compute either way.
            let _ = running.updates.send(finished);
            self.scheduler.stop(id, choice);
        }
        if running.texts.iter().all(Option::is_none) {
            let ticket = running.ticket;
            self.jobs.remove(&id);
            self.tickets.remove(&ticket);
        }
    }
}

impl Running<'_> {
    fn finish(
        &self,
        choice: usize,
        text: Text<'_>,
        reason: FinishReason,
        sequence: Option<Box<Sequence>>,
    ) -> Result<(), tokio::sync::mpsc::error::SendError<Update>> {
        let Text { decoder, mut watch, .. } = text;
        let (shown, hit) = watch.push(&decoder.finish());
        let reason = if hit { FinishReason::Stop } else { reason };
        let rest = if hit { String::new() } else { watch.finish() };
        self.updates.send(Update::Finished { choice, text: shown + &rest, reason, sequence })
    }
}
