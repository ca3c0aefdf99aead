//! From the engine's updates to the bodies that clients get: one object at the end, or events as they come.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::response::sse::Event;
use sluice_data::{Message, Tokenizer};
use sluice_engine::scheduler::{FinishReason, SubmitError};
use sluice_engine::{Choice, Sequence};

use crate::api::{AnswerMessage, ChatLogprob, Completion, CompletionChoice, Kept, Logprobs, TopLogprob, Usage};
use crate::error::ApiError;
use crate::plan::{Kind, Plan};
use crate::sessions::{Loan, SessionState};
use crate::worker::{Job, Update};

/// What all bodies of an answer have in common, and what is counted on the way.
pub(crate) struct Answer {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: String,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) n_layers: usize,
    kind: Kind,
    /// Alternatives, where probabilities are reported.
    logprobs: Option<usize>,
    include_usage: bool,
    /// Texts of the prompt's tokens, until they have been told.
    prompt_tokens: Option<Vec<String>>,
    usage: Usage,
    choices: Vec<ChoiceState>,
    session: Option<Session>,
    session_id: Option<String>,
}

/// The session that the answer continues.
struct Session {
    loan: Loan,
    /// Before the answer.
    text: String,
    messages: Vec<Message>,
    created: u64,
    answer: String,
}

#[derive(Default)]
struct ChoiceState {
    text: String,
    tokens: Vec<(Choice, Vec<Choice>)>,
    finish: Option<&'static str>,
    kept: Option<Vec<u16>>,
    /// Characters that the tokens told so far have.
    offset: usize,
}

/// Names and numbers of a model that every body repeats.
pub(crate) struct Labels {
    pub(crate) model: String,
    pub(crate) fingerprint: String,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) n_layers: usize,
    pub(crate) now: u64,
}

impl Answer {
    /// `session` is the one to continue, and when it was made.
    pub(crate) fn new(labels: Labels, plan: &Plan, session: Option<(Loan, u64)>) -> Self {
        let Labels { model, fingerprint, tokenizer, n_layers, now } = labels;
        let prefix = if plan.kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let spelled = |id: &u32| tokenizer.decode_with_special(&[*id]);
        let prompt_tokens = plan.request.report_kept.then(|| plan.request.prompt.iter().map(spelled).collect());
        let session = session.map(|(loan, created)| Session {
            loan,
            text: plan.text.clone(),
            messages: plan.messages.clone(),
            created,
            answer: String::new(),
        });
        let session_id = session.as_ref().map(|session| session.loan.id().to_string());
        let usage = Usage { prompt_tokens: plan.request.prompt.len(), total_tokens: plan.request.prompt.len(), ..Usage::default() };
        Self {
            id: format!("{prefix}-{}", uuid::Uuid::new_v4().simple()),
            created: now,
            model,
            fingerprint,
            tokenizer,
            n_layers,
            kind: plan.kind,
            logprobs: plan.logprobs,
            include_usage: plan.include_usage,
            prompt_tokens,
            usage,
            choices: (0..plan.request.choices).map(|_| ChoiceState::default()).collect(),
            session,
            session_id,
        }
    }

    fn body(&self, object: &'static str, choices: Vec<CompletionChoice>) -> Completion {
        Completion {
            id: self.id.clone(),
            object,
            created: self.created,
            model: self.model.clone(),
            system_fingerprint: self.fingerprint.clone(),
            choices,
            usage: None,
            kept: None,
            session_id: self.session_id.clone(),
        }
    }

    /// Account for an update; its text and tokens are then in the choice that is returned.
    fn take(&mut self, update: Update) -> Result<Option<usize>, ApiError> {
        match update {
            Update::Started { cached } => {
                self.usage.prompt_tokens_details.cached_tokens = cached;
                Ok(None)
            }
            Update::Token { choice, text, token, top } => {
                self.usage.completion_tokens += 1;
                self.usage.total_tokens += 1;
                self.note_for_session(&text);
                let state = &mut self.choices[choice];
                state.text.push_str(&text);
                if self.logprobs.is_some() {
                    state.tokens.push((token, top));
                }
                Ok(Some(choice))
            }
            Update::Kept { choice, layers } => {
                self.choices[choice].kept = Some(layers);
                Ok(Some(choice))
            }
            Update::Finished { choice, text, reason, sequence } => {
                self.note_for_session(&text);
                let state = &mut self.choices[choice];
                state.text.push_str(&text);
                state.finish = Some(match reason {
                    FinishReason::Stop => "stop",
                    FinishReason::Length => "length",
                });
                if let Some(sequence) = sequence {
                    self.keep(sequence);
                }
                Ok(Some(choice))
            }
            Update::Refused(SubmitError::Busy(_)) => Err(ApiError::busy()),
            Update::Refused(SubmitError::Invalid(what)) => Err(ApiError::invalid("", what)),
        }
    }

    /// A session holds the answer's text too.
    fn note_for_session(&mut self, text: &str) {
        if let Some(session) = &mut self.session {
            session.answer.push_str(text);
        }
    }

    /// The session goes on from the end of the answer.
    fn keep(&mut self, sequence: Box<Sequence>) {
        let Some(Session { loan, text, mut messages, created, answer }) = self.session.take() else { return };
        let text = text + &answer;
        if self.kind == Kind::Chat {
            messages.push(Message::new("assistant", answer));
        }
        loan.give_back(SessionState { sequence, text, messages, created });
    }

    fn logprobs_of(&mut self, choice: usize) -> Option<Logprobs> {
        let alternatives = self.logprobs?;
        let tokens = std::mem::take(&mut self.choices[choice].tokens);
        let spelled = |token: u32| self.tokenizer.decode_with_special(&[token]);
        // Half a character is spelled as U+FFFD, whose bytes are not the token's.
        let bytes = |text: &str| (!text.contains('\u{FFFD}')).then(|| text.as_bytes().to_vec());
        if self.kind == Kind::Chat {
            let alternative = |c: &Choice| {
                let token = spelled(c.token);
                TopLogprob { bytes: bytes(&token), token, logprob: c.logprob }
            };
            let content = tokens.iter().map(|(token, top)| {
                let TopLogprob { token, logprob, bytes } = alternative(token);
                ChatLogprob { token, logprob, bytes, top_logprobs: top.iter().map(alternative).collect() }
            });
            return Some(Logprobs::Chat { content: content.collect() });
        }
        let offset = &mut self.choices[choice].offset;
        let mut text_offset = Vec::with_capacity(tokens.len());
        for (token, _) in &tokens {
            text_offset.push(*offset);
            *offset += spelled(token.token).chars().count();
        }
        let top = |top: &Vec<Choice>| -> BTreeMap<String, f32> { top.iter().map(|c| (spelled(c.token), c.logprob)).collect() };
        Some(Logprobs::Completion {
            tokens: tokens.iter().map(|(token, _)| spelled(token.token)).collect(),
            token_logprobs: tokens.iter().map(|(token, _)| token.logprob).collect(),
            top_logprobs: if alternatives > 0 { tokens.iter().map(|(_, tops)| top(tops)).collect() } else { Vec::new() },
            text_offset,
        })
    }

    fn kept_of(&mut self, choice: usize) -> Option<Kept> {
        let layers = self.choices[choice].kept.take()?;
        Some(Kept { index: choice, n_layers: self.n_layers, layers, tokens: self.prompt_tokens.take() })
    }

    /// The whole answer as one body.
    pub(crate) async fn collect(mut self, mut job: Job) -> Result<Completion, ApiError> {
        loop {
            let Some(update) = job.updates.recv().await else { return Err(ApiError::internal()) };
            let finished = matches!(update, Update::Finished { .. });
            self.take(update)?;
            if finished && job.finish_one() {
                break;
            }
        }
        let kept = (0..self.choices.len()).find_map(|choice| self.kept_of(choice));
        let choices = (0..self.choices.len())
            .map(|index| {
                let logprobs = self.logprobs_of(index);
                let state = &mut self.choices[index];
                let text = std::mem::take(&mut state.text);
                let choice = CompletionChoice { index, logprobs, finish_reason: state.finish, ..CompletionChoice::default() };
                match self.kind {
                    Kind::Completion => CompletionChoice { text: Some(text), ..choice },
                    Kind::Chat => {
                        CompletionChoice { message: Some(AnswerMessage { role: Some("assistant"), content: Some(text) }), ..choice }
                    }
                }
            })
            .collect();
        let object = if self.kind == Kind::Chat { "chat.completion" } else { "text_completion" };
        Ok(Completion { usage: Some(self.usage), kept, ..self.body(object, choices) })
    }

    /// One event of a stream for what an update brought, if it brought anything.
    fn piece(&mut self, choice: usize) -> Option<Completion> {
        let logprobs = self.logprobs_of(choice);
        let kept = self.kept_of(choice);
        let state = &mut self.choices[choice];
        let (text, finish_reason) = (std::mem::take(&mut state.text), state.finish.take());
        let has_tokens = match &logprobs {
            Some(Logprobs::Chat { content }) => !content.is_empty(),
            Some(Logprobs::Completion { tokens, .. }) => !tokens.is_empty(),
            None => false,
        };
        if text.is_empty() && finish_reason.is_none() && kept.is_none() && !has_tokens {
            return None;
        }
        let logprobs = logprobs.filter(|_| has_tokens);
        let piece = CompletionChoice { index: choice, logprobs, finish_reason, ..CompletionChoice::default() };
        let (object, piece) = match self.kind {
            Kind::Completion => ("text_completion", CompletionChoice { text: Some(text), ..piece }),
            Kind::Chat => {
                let content = (!text.is_empty()).then_some(text);
                ("chat.completion.chunk", CompletionChoice { delta: Some(AnswerMessage { role: None, content }), ..piece })
            }
        };
        Some(Completion { kept, ..self.body(object, vec![piece]) })
    }
}

/// The answer as server-sent events. Dropping it cancels what is not complete.
pub(crate) struct EventStream {
    answer: Answer,
    job: Option<Job>,
    ready: VecDeque<Event>,
}

impl EventStream {
    pub(crate) fn new(answer: Answer, job: Job) -> Self {
        let mut ready = VecDeque::new();
        if answer.kind == Kind::Chat {
            let first = |index| {
                let delta = AnswerMessage { role: Some("assistant"), content: Some(String::new()) };
                CompletionChoice { index, delta: Some(delta), ..CompletionChoice::default() }
            };
            let choices = (0..answer.choices.len()).map(first).collect();
            ready.push_back(event(&answer.body("chat.completion.chunk", choices)));
        }
        Self { answer, job: Some(job), ready }
    }

    fn take(&mut self, update: Update) {
        let Some(job) = &mut self.job else { return };
        let finished = matches!(update, Update::Finished { .. });
        match self.answer.take(update) {
            Ok(Some(choice)) => self.ready.extend(self.answer.piece(choice).as_ref().map(event)),
            Ok(None) => {}
            Err(error) => return self.fail(&error),
        }
        if finished && job.finish_one() {
            if self.answer.include_usage {
                let object = if self.answer.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" };
                let usage = Completion { usage: Some(self.answer.usage), ..self.answer.body(object, Vec::new()) };
                self.ready.push_back(event(&usage));
            }
            self.ready.push_back(Event::default().data("[DONE]"));
            self.job = None;
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.ready.push_back(event(&error.body()));
        self.job = None;
    }
}

fn event(body: &impl serde::Serialize) -> Event {
    Event::default().data(serde_json::to_string(body).expect("a body is plain data"))
}

impl futures_core::Stream for EventStream {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            let Some(job) = &mut self.job else { return Poll::Ready(None) };
            match job.updates.poll_recv(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(update)) => self.take(update),
                Poll::Ready(None) => self.fail(&ApiError::internal()),
            }
        }
    }
}
