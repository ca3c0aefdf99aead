//! A parsed request against the model: text becomes tokens, defaults are filled in, everything out of range is refused.
//! What comes out can be computed as it is.

use sluice_data::{ChatTemplate, Message, Tokenizer};
use sluice_engine::scheduler::Request;
use sluice_engine::{SamplingConfig, Sequence};

use crate::api::{ChatMessage, ChatRequest, CompletionRequest, Content, Prompt, SessionRequest, Shared, Stop};
use crate::error::ApiError;
use crate::sessions::SessionState;

/// Alternatives that may be asked for with each token.
const MAX_TOP_LOGPROBS: usize = 20;
/// Stop strings of a request, and bytes of one.
const MAX_STOPS: usize = 4;
const MAX_STOP_BYTES: usize = 1024;
/// Tokens of a completion when the request says nothing.
const DEFAULT_COMPLETION_TOKENS: usize = 16;

/// What requests are measured against.
pub struct ModelFacts {
    /// Name in the API.
    pub name: String,
    /// The model's tokenizer.
    pub tokenizer: std::sync::Arc<Tokenizer>,
    /// Its chat template, if it has one that parses.
    pub template: Option<ChatTemplate>,
    /// Rows of its embedding.
    pub vocab_size: usize,
    /// Tokens of a prompt and its answer at most.
    pub max_context: usize,
    /// Answers to one prompt at most.
    pub max_choices: usize,
}

/// Which endpoint asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Completion,
    Chat,
}

/// A request that can be computed.
pub struct Plan {
    pub(crate) kind: Kind,
    pub(crate) request: Request,
    pub(crate) stops: Vec<String>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Alternatives to report; none reports no probabilities.
    pub(crate) logprobs: Option<usize>,
    /// What the prompt is as text, and as a conversation: what a session holds after it, before the answer.
    pub(crate) text: String,
    pub(crate) messages: Vec<Message>,
}

/// Plan `/v1/completions`. `session` is what the named session holds.
pub fn completion(facts: &ModelFacts, body: &CompletionRequest, session: Option<&SessionStateView<'_>>) -> Result<Plan, ApiError> {
    let shared = body.shared();
    check_model(facts, shared.model)?;
    let (prompt, text) = read_prompt(facts, &body.prompt, session)?;
    if let Some(n) = body.logprobs.filter(|&n| n > MAX_TOP_LOGPROBS) {
        return Err(ApiError::invalid("logprobs", format!("found {n}; expected at most {MAX_TOP_LOGPROBS}")));
    }
    let max_tokens = body.max_tokens.unwrap_or(DEFAULT_COMPLETION_TOKENS);
    let whole = session.map_or("", |session| session.text).to_string() + &text;
    finish(facts, Kind::Completion, &shared, prompt, Some(max_tokens), body.logprobs, session, whole, Vec::new())
}

/// Plan `/v1/chat/completions`.
pub fn chat(facts: &ModelFacts, body: &ChatRequest, session: Option<&SessionStateView<'_>>) -> Result<Plan, ApiError> {
    let shared = body.shared();
    check_model(facts, shared.model)?;
    let (prompt, text, messages) = read_messages(facts, &body.messages, session, true)?;
    let top = body.top_logprobs.unwrap_or(0);
    if top > MAX_TOP_LOGPROBS {
        return Err(ApiError::invalid("top_logprobs", format!("found {top}; expected at most {MAX_TOP_LOGPROBS}")));
    }
    if top > 0 && body.logprobs != Some(true) {
        return Err(ApiError::invalid("top_logprobs", "found top_logprobs without `logprobs: true`"));
    }
    let logprobs = (body.logprobs == Some(true)).then_some(top);
    if body.max_tokens.is_some() && body.max_completion_tokens.is_some_and(|n| Some(n) != body.max_tokens) {
        return Err(ApiError::invalid("max_completion_tokens", "found another value than that of max_tokens; expected one of the two"));
    }
    let max_tokens = body.max_completion_tokens.or(body.max_tokens);
    finish(facts, Kind::Chat, &shared, prompt, max_tokens, logprobs, session, text, messages)
}

/// Plan `POST /v1/sessions`: read, answer nothing, keep the state.
pub fn session(facts: &ModelFacts, body: &SessionRequest) -> Result<Plan, ApiError> {
    check_model(facts, &body.model)?;
    let (prompt, text, messages) = match (&body.prompt, &body.messages) {
        (Some(prompt), None) => {
            let (ids, text) = read_prompt(facts, prompt, None)?;
            (ids, text, Vec::new())
        }
        (None, Some(messages)) => read_messages(facts, messages, None, false)?,
        _ => return Err(ApiError::invalid("prompt", "expected either a prompt or messages")),
    };
    if prompt.len() > facts.max_context {
        return Err(ApiError::too_long("prompt", prompt.len(), facts.max_context));
    }
    Ok(Plan {
        kind: Kind::Completion,
        request: Request { keep: true, ..Request::new(prompt, 0) },
        stops: Vec::new(),
        stream: false,
        include_usage: false,
        logprobs: None,
        text,
        messages,
    })
}

/// What planning needs to know of a session.
pub struct SessionStateView<'a> {
    pub(crate) sequence: &'a Sequence,
    pub(crate) text: &'a str,
    pub(crate) messages: &'a [Message],
}

impl<'a> From<&'a SessionState> for SessionStateView<'a> {
    fn from(state: &'a SessionState) -> Self {
        Self { sequence: &state.sequence, text: &state.text, messages: &state.messages }
    }
}

fn check_model(facts: &ModelFacts, model: &str) -> Result<(), ApiError> {
    if model == facts.name {
        return Ok(());
    }
    let found: String = model.chars().take(100).collect();
    Err(ApiError::not_found("model", "model_not_found", format!("found model `{found}`; expected `{}`", facts.name)))
}

/// Ids of a prompt, and its text.
fn read_prompt(facts: &ModelFacts, prompt: &Prompt, session: Option<&SessionStateView<'_>>) -> Result<(Vec<u32>, String), ApiError> {
    let (ids, text) = match prompt {
        // An empty array is one of ids, as far as its type goes.
        Prompt::Tokens(ids) => {
            if let Some(id) = ids.iter().find(|&&id| id as usize >= facts.vocab_size) {
                return Err(ApiError::invalid("prompt", format!("found token {id}; expected ids below {}", facts.vocab_size)));
            }
            (ids.clone(), facts.tokenizer.decode_with_special(ids))
        }
        Prompt::Text(text) => (encode(facts, text, session.is_some()), text.clone()),
        Prompt::Texts(texts) => match texts.as_slice() {
            [text] => (encode(facts, text, session.is_some()), text.clone()),
            more => return Err(ApiError::invalid("prompt", format!("found {} prompts; expected one a request", more.len()))),
        },
    };
    if ids.is_empty() {
        return Err(ApiError::invalid("prompt", "found an empty prompt; expected at least one token"));
    }
    Ok((ids, text))
}

/// What follows in a session has no beginning-of-text.
fn encode(facts: &ModelFacts, text: &str, follows: bool) -> Vec<u32> {
    if follows { facts.tokenizer.encode_chat(text) } else { facts.tokenizer.encode_with_special(text) }
}

/// Ids of what is new in a conversation, its whole text, and all of its messages.
fn read_messages(
    facts: &ModelFacts,
    fresh: &[ChatMessage],
    session: Option<&SessionStateView<'_>>,
    answer_follows: bool,
) -> Result<(Vec<u32>, String, Vec<Message>), ApiError> {
    let Some(template) = &facts.template else {
        return Err(ApiError::invalid("messages", format!("model `{}` has no chat template; use /v1/completions", facts.name)));
    };
    if fresh.is_empty() {
        return Err(ApiError::invalid("messages", "found no messages; expected at least one"));
    }
    let mut messages = session.map_or(Vec::new(), |session| session.messages.to_vec());
    messages.extend(fresh.iter().map(|ChatMessage { role, content }| Message::new(role.as_str(), Content::text(content))));
    let text = template.render(&messages, answer_follows).map_err(|e| ApiError::invalid("messages", e.to_string()))?;
    let read = session.map_or("", |session| session.text);
    let Some(rest) = text.strip_prefix(read) else {
        let message = "the model's template rewrites what the session has read; send the whole conversation without a session";
        return Err(ApiError::invalid("session_id", message));
    };
    let ids = facts.tokenizer.encode_chat(rest);
    if ids.is_empty() {
        return Err(ApiError::invalid("messages", "found messages without a token; expected at least one"));
    }
    Ok((ids, text, messages))
}

fn finish(
    facts: &ModelFacts,
    kind: Kind,
    shared: &Shared<'_>,
    prompt: Vec<u32>,
    max_tokens: Option<usize>,
    logprobs: Option<usize>,
    session: Option<&SessionStateView<'_>>,
    text: String,
    messages: Vec<Message>,
) -> Result<Plan, ApiError> {
    let param = if kind == Kind::Chat { "messages" } else { "prompt" };
    let read = session.map_or(0, |session| session.sequence.position()) + prompt.len();
    let room = facts.max_context.checked_sub(read).filter(|&room| room > 0);
    let Some(room) = room else { return Err(ApiError::too_long(param, read + 1, facts.max_context)) };
    let max_tokens = max_tokens.unwrap_or(room);
    if max_tokens == 0 {
        return Err(ApiError::invalid("max_tokens", "found 0; expected at least 1"));
    }
    if max_tokens > room {
        return Err(ApiError::too_long(param, read.saturating_add(max_tokens), facts.max_context));
    }
    let choices = shared.n.unwrap_or(1);
    if choices == 0 || choices > facts.max_choices {
        return Err(ApiError::invalid("n", format!("found {choices}; expected 1 to {}", facts.max_choices)));
    }
    let stops = match shared.stop {
        None => Vec::new(),
        Some(Stop::One(stop)) => vec![stop.clone()],
        Some(Stop::Many(stops)) => stops.clone(),
    };
    if stops.len() > MAX_STOPS || stops.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
        let message = format!("expected at most {MAX_STOPS} texts of 1 to {MAX_STOP_BYTES} bytes");
        return Err(ApiError::invalid("stop", message));
    }
    if session.is_some() && (choices > 1 || !stops.is_empty()) {
        // Its state would hold the stop string, or belong to one of several answers.
        let param = if choices > 1 { "n" } else { "stop" };
        return Err(ApiError::invalid(param, "a session goes on with one answer, without stop strings; stop_token_ids work"));
    }
    let stream = shared.stream.unwrap_or(false);
    if shared.stream_options.is_some() && !stream {
        return Err(ApiError::invalid("stream_options", "found stream_options without `stream: true`"));
    }
    let mut stop_tokens = facts.tokenizer.eos().to_vec();
    for &id in shared.stop_token_ids.unwrap_or_default() {
        if id as usize >= facts.vocab_size {
            return Err(ApiError::invalid("stop_token_ids", format!("found token {id}; expected ids below {}", facts.vocab_size)));
        }
        stop_tokens.push(id);
    }
    let request = Request {
        from: session.map(|session| Box::new(session.sequence.clone())),
        choices,
        stop_tokens,
        sampling: sampling(facts, shared)?,
        top_logprobs: logprobs.unwrap_or(0),
        report_kept: shared.report_kept.unwrap_or(false),
        keep: session.is_some(),
        ..Request::new(prompt, max_tokens)
    };
    let include_usage = shared.stream_options.is_some_and(|options| options.include_usage == Some(true));
    Ok(Plan { kind, request, stops, stream, include_usage, logprobs, text, messages })
}

fn sampling(facts: &ModelFacts, shared: &Shared<'_>) -> Result<SamplingConfig, ApiError> {
    // Read as f64: as f32, a number beyond its range would be called bad JSON.
    let number = |param: &str, given: Option<f64>, default: f64, least: f64, most: f64| {
        let number = given.unwrap_or(default);
        if (least..=most).contains(&number) {
            return Ok(number as f32);
        }
        Err(ApiError::invalid(param, format!("found {number:?}; expected {least} to {most}")))
    };
    let mut logit_bias = Vec::new();
    for (token, &bias) in shared.logit_bias.into_iter().flatten() {
        let id = token.parse::<u32>().ok().filter(|&id| (id as usize) < facts.vocab_size);
        let Some(id) = id else {
            let shown: String = token.chars().take(40).collect();
            return Err(ApiError::invalid("logit_bias", format!("found token `{shown}`; expected ids below {}", facts.vocab_size)));
        };
        logit_bias.push((id, number("logit_bias", Some(bias), 0.0, -100.0, 100.0)?));
    }
    Ok(SamplingConfig {
        temperature: number("temperature", shared.temperature, 1.0, 0.0, 2.0)?,
        top_k: shared.top_k.unwrap_or(0),
        top_p: number("top_p", shared.top_p, 1.0, 0.0, 1.0)?,
        min_p: number("min_p", shared.min_p, 0.0, 0.0, 1.0)?,
        repetition_penalty: number("repetition_penalty", shared.repetition_penalty, 1.0, 0.01, 100.0)?,
        presence_penalty: number("presence_penalty", shared.presence_penalty, 0.0, -2.0, 2.0)?,
        frequency_penalty: number("frequency_penalty", shared.frequency_penalty, 0.0, -2.0, 2.0)?,
        logit_bias,
        seed: shared.seed.map_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0, |seed| seed as u64),
    })
}

/// Parse a body as every kind of request and plan what parses: what the fuzz target and the property tests drive. Returns how
/// many of the three kinds it is.
pub fn read_as_every_kind(facts: &ModelFacts, body: &[u8]) -> usize {
    let completion = crate::api::parse::<CompletionRequest>(body).and_then(|body| completion(facts, &body, None));
    let chat = crate::api::parse::<ChatRequest>(body).and_then(|body| chat(facts, &body, None));
    let session = crate::api::parse::<SessionRequest>(body).and_then(|body| session(facts, &body));
    let mut planned = 0;
    for plan in [completion, chat, session] {
        match plan {
            Ok(Plan { request, stops, .. }) => {
                // What the engine and the worker rely on.
                assert!(!request.prompt.is_empty() && request.prompt.iter().all(|&id| (id as usize) < facts.vocab_size));
                assert!(request.prompt.len() + request.max_tokens <= facts.max_context);
                assert!((1..=facts.max_choices).contains(&request.choices) && stops.iter().all(|stop| !stop.is_empty()));
                assert!(request.sampling.temperature.is_finite() && request.sampling.repetition_penalty > 0.0);
                planned += 1;
            }
            Err(error) => assert!((400..500).contains(&error.status()) && !error.detail().message.is_empty()),
        }
    }
    planned
}
