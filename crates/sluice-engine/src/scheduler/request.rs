//! What the scheduler is asked for and what it tells, as plain values.

use crate::sampling::{Choice, SamplingConfig};
use crate::sequence::Sequence;

/// Names a request for as long as the scheduler lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub(super) u64);

/// A text to read and to continue.
#[derive(Clone)]
pub struct Request {
    /// Tokens to read, at least one.
    pub prompt: Vec<u32>,
    /// What was read before, if this continues a session.
    pub from: Option<Box<Sequence>>,
    /// Continuations, each in a slot of its own; the prompt is read once.
    pub choices: usize,
    /// Tokens of a continuation at most; with 0 the prompt is read and nothing else.
    pub max_tokens: usize,
    /// Tokens that end a continuation and do not belong to it.
    pub stop_tokens: Vec<u32>,
    /// How tokens are chosen. Each continuation after the first has a seed of its own, made from this one.
    pub sampling: SamplingConfig,
    /// Most likely alternatives to report with every token.
    pub top_logprobs: usize,
    /// Report which prompt tokens are still kept, once read and whenever that may have changed.
    pub report_kept: bool,
    /// Hand out the state of every continuation at its end, all of its tokens read.
    pub keep: bool,
    /// Whose request it is. Stored beginnings serve only requests of the owner who made them: how fast a prompt is read would
    /// otherwise tell what others have sent.
    pub owner: u64,
}

impl Request {
    /// Read a prompt and continue it greedily.
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
            from: None,
            choices: 1,
            max_tokens,
            stop_tokens: Vec::new(),
            sampling: SamplingConfig::default(),
            top_logprobs: 0,
            report_kept: false,
            keep: false,
            owner: 0,
        }
    }
}

/// What happened to a request.
pub enum Event {
    /// It has its slots.
    Started {
        /// The request.
        id: RequestId,
        /// Prompt tokens that a stored prefix saved.
        cached: usize,
    },
    /// A token was chosen.
    Token {
        /// The request.
        id: RequestId,
        /// Which of its continuations.
        choice: usize,
        /// The token.
        token: Choice,
        /// The most likely ones, most likely first.
        top: Vec<Choice>,
    },
    /// How far prompt tokens are still kept.
    Kept {
        /// The request.
        id: RequestId,
        /// Which of its continuations.
        choice: usize,
        /// For every token of the prompt, and of what was read before it: layers in which some KV head holds its key.
        layers: Vec<u16>,
    },
    /// A continuation is complete and its slot free.
    Finished {
        /// The request.
        id: RequestId,
        /// Which of its continuations.
        choice: usize,
        /// Why.
        reason: FinishReason,
        /// Its state, if it was asked for.
        sequence: Option<Box<Sequence>>,
    },
}

/// Why a continuation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token.
    Stop,
    /// As long as it was allowed to be.
    Length,
}

/// A request that the scheduler does not take.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The queue is full; try again later.
    #[error("{0} requests are waiting; no more are taken")]
    Busy(usize),
    /// It could never run.
    #[error("{0}")]
    Invalid(String),
}
