//! Held-out loss of a policy on windows of a text, per token.

use serde::{Deserialize, Serialize};
use sluice_autograd::Tape;
use sluice_kernels::output_head::{self, Wanted};
use sluice_model::{AttentionPlan, Decoder, Forward};

/// Loss of every scored token of one window.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct WindowNll {
    /// Negative log-likelihood in nats of tokens `from..len`, in order.
    pub nll: Vec<f32>,
    /// Whether the model's first choice was the token.
    pub top1: Vec<bool>,
}

/// Score one window on its own: token `i` is predicted from tokens `0..i`; tokens `from..` are scored, `from >= 1`.
#[track_caller]
pub fn window_nll(model: &Decoder, tokens: &[u32], plan: &AttentionPlan, from: usize) -> WindowNll {
    assert!(from >= 1, "the first token of a window has nothing to be predicted from");
    let t = tokens.len();
    if t <= from {
        return WindowNll::default();
    }
    let hidden = model.forward(&Tape::frozen(), tokens, &[t], plan, Forward::default());
    let h = hidden.h.value().reshape([t, model.config.d_model]);
    let targets: Vec<u32> = tokens[1..].iter().copied().chain([0]).collect();
    let weights: Vec<f32> = (0..t).map(|i| if i + 1 >= from && i + 1 < t { 1.0 } else { 0.0 }).collect();
    let scored = output_head::cross_entropy(&h, &model.head().value, &targets, &weights, Wanted::NOTHING);
    WindowNll {
        nll: scored.nll[from - 1..t - 1].to_vec(),
        top1: scored.top1[from - 1..t - 1].iter().zip(&tokens[from..]).map(|(a, b)| a == b).collect(),
    }
}

/// Mean loss over windows, as `sluice eval nll` prints it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Nll {
    /// Tokens scored.
    pub tokens: usize,
    /// Mean negative log-likelihood in nats.
    pub nll: f64,
    /// The same in bits per byte of text, comparable across tokenizers.
    pub bits_per_byte: f64,
    /// Share of tokens that were the model's first choice.
    pub top1: f64,
    /// First scored token of each window.
    pub positions_from: usize,
    /// Loss of every scored token, windows in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_token: Option<Vec<f32>>,
    /// Ids of the windows' tokens, unscored ones included, so that a peer can score the same ids.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<Vec<u32>>>,
}

impl Nll {
    /// Summarise scored windows; `bytes` is the length of the scored tokens' text.
    pub fn summarise(windows: &[WindowNll], bytes: usize, positions_from: usize) -> Self {
        let tokens = windows.iter().map(|w| w.nll.len()).sum::<usize>();
        let sum: f64 = windows.iter().flat_map(|w| &w.nll).map(|&x| x as f64).sum();
        let hits = windows.iter().flat_map(|w| &w.top1).filter(|hit| **hit).count();
        let per = |x: f64, n: usize| x / n.max(1) as f64;
        Self {
            tokens,
            nll: per(sum, tokens),
            bits_per_byte: per(sum / std::f64::consts::LN_2, bytes),
            top1: per(hits as f64, tokens),
            positions_from,
            per_token: None,
            token_ids: None,
        }
    }
}
