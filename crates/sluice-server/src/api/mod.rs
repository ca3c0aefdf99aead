//! What clients send and get, as types. Parsing here needs nothing but the bytes, which is what the fuzz target drives;
//! whether a request fits the model is decided in [`plan`](crate::plan).

mod request;
mod response;

pub(crate) use request::Shared;
pub use request::{ChatMessage, ChatRequest, CompletionRequest, Content, ContentPart, Prompt, SessionRequest, Stop, StreamOptions, parse};
pub(crate) use response::{
    AnswerMessage, ChatLogprob, Completion, CompletionChoice, Deleted, Kept, Logprobs, ModelEntry, ModelList, SessionEntry, SessionList,
    TopLogprob, Usage,
};
