//! The engine: an artifact ready to compute, with its threads and all scratch. Sequences are separate values; one engine
//! continues any number of them, one at a time or several in one pass.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use sluice_kernels::int8_linear::InstructionSet;
use sluice_kernels::worker_team::WorkerTeam;
use sluice_spec::{ModelConfig, RoutingConfig};

use crate::artifact::{Artifact, ArtifactError};
use crate::forward::{self, Part, Scratch};
use crate::sequence::Sequence;
use crate::weights::Weights;
use sluice_spec::rope_frequencies::inverse_frequencies;

/// Choices that change speed and memory, and no number (but see [`sluice_kernels::cached_attention`]).
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Threads to compute with.
    pub threads: usize,
    /// Tokens that go through the model at once; scratch grows with it.
    pub chunk: usize,
    /// Sequences whose next token can be chosen after one pass; scratch for logits grows with it.
    pub sequences: usize,
    /// Inner loops of the int8 products.
    pub instructions: InstructionSet,
    /// Another budget than the artifact's.
    pub routing: Option<RoutingConfig>,
}

impl Default for Options {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self { threads, chunk: 256, sequences: 1, instructions: InstructionSet::best(), routing: None }
    }
}

/// What the engine refuses.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The artifact cannot be read.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// A token that the model has no embedding for.
    #[error("token {token} at place {place}; expected ids below {vocab_size}")]
    Token {
        /// The id.
        token: u32,
        /// Its place among the tokens given.
        place: usize,
        /// The model's vocabulary.
        vocab_size: usize,
    },
    /// Options that contradict the machine or each other.
    #[error("{0}")]
    Options(String),
    /// More than the engine has room for, see [`Options`].
    #[error("a pass over {tokens} tokens, {logits} of them with logits; expected at most {chunk} and {sequences}")]
    Room {
        /// Tokens of the pass.
        tokens: usize,
        /// Logits wanted.
        logits: usize,
        /// Room for tokens.
        chunk: usize,
        /// Room for logits.
        sequences: usize,
    },
    /// A sequence of another engine.
    #[error("the sequence was made for another model or routing")]
    Sequence,
}

/// An artifact ready to compute.
pub struct Engine {
    pub(crate) artifact: Artifact,
    pub(crate) weights: Weights,
    pub(crate) routing: RoutingConfig,
    pub(crate) instructions: InstructionSet,
    pub(crate) inv_freq: Vec<f32>,
    pub(crate) team: WorkerTeam,
    pub(crate) scratch: Scratch,
}

impl Engine {
    /// Load an artifact folder. `verify` also checks the digests of its files.
    pub fn open(folder: &Path, verify: bool, options: Options) -> Result<Self, EngineError> {
        Self::new(Artifact::open(folder, verify)?, options)
    }

    /// Make an artifact ready: starts the threads and allocates every buffer that computing needs.
    pub fn new(artifact: Artifact, options: Options) -> Result<Self, EngineError> {
        let Options { threads, chunk, sequences, instructions, routing } = options;
        if threads == 0 || chunk == 0 || sequences == 0 {
            let found = format!("{threads} threads, chunks of {chunk} tokens and {sequences} sequences");
            return Err(EngineError::Options(format!("{found}; expected at least 1 of each")));
        }
        if !instructions.is_available() {
            return Err(EngineError::Options(format!("this machine has no {}", instructions.name())));
        }
        let routing = routing.unwrap_or(artifact.manifest.routing);
        routing.validate().map_err(|e| EngineError::Options(e.to_string()))?;
        if routing.gate_heads != artifact.manifest.routing.gate_heads && artifact.manifest.has_gates {
            return Err(EngineError::Options("the routing asks for another kind of gate than the artifact has".into()));
        }
        let model = &artifact.manifest.model;
        Ok(Self {
            weights: Weights::of(&artifact),
            inv_freq: inverse_frequencies(model),
            scratch: Scratch::new(model, &routing, artifact.manifest.group, threads, chunk, sequences),
            team: WorkerTeam::new(threads),
            routing,
            instructions,
            artifact,
        })
    }

    /// Shape of the model.
    pub fn model(&self) -> &ModelConfig {
        &self.artifact.manifest.model
    }

    /// Budget and rhythm in use.
    pub fn routing(&self) -> &RoutingConfig {
        &self.routing
    }

    /// The artifact.
    pub fn artifact(&self) -> &Artifact {
        &self.artifact
    }

    /// The artifact, for instance to note its measured quality before it is written.
    pub fn into_artifact(self) -> Artifact {
        self.artifact
    }

    /// Inner loops in use.
    pub fn instructions(&self) -> InstructionSet {
        self.instructions
    }

    /// Compute with other inner loops, for comparisons.
    pub fn set_instructions(&mut self, instructions: InstructionSet) -> Result<(), EngineError> {
        if !instructions.is_available() {
            return Err(EngineError::Options(format!("this machine has no {}", instructions.name())));
        }
        self.instructions = instructions;
        Ok(())
    }

    /// Read every byte of the weights once, with all threads: what a decode step cannot do without. Returns their XOR.
    pub fn read_weights(&mut self) -> u64 {
        const PIECE: usize = 1 << 17;
        let words = self.artifact.weight_words();
        let total = AtomicU64::new(0);
        self.team.run(words.len().div_ceil(PIECE), |piece| {
            let words = &words[piece * PIECE..words.len().min((piece + 1) * PIECE)];
            // Independent lanes, or the chain of operations would be the limit.
            let (blocks, rest) = words.as_chunks::<16>();
            let mut lanes = [0; 16];
            for block in blocks {
                lanes.iter_mut().zip(block).for_each(|(lane, word)| *lane ^= word);
            }
            total.fetch_xor(lanes.iter().chain(rest).fold(0, |all, word| all ^ word), Ordering::Relaxed);
        });
        total.into_inner()
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.team.n_threads()
    }

    /// An empty sequence. Its cache is allocated here and never grows.
    pub fn new_sequence(&self) -> Sequence {
        Sequence::new(self.model(), &self.routing)
    }

    /// Continue a sequence by tokens, a prompt or a single one; returns the logits `[V]` after the last of them.
    ///
    /// However the tokens are cut into calls, the result is the same to the bit. A call with one token allocates
    /// nothing. On an error the sequence is as it was. Panics without tokens.
    #[track_caller]
    pub fn extend(&mut self, sequence: &mut Sequence, tokens: &[u32]) -> Result<&[f32], EngineError> {
        assert!(!tokens.is_empty(), "extend: no tokens");
        self.check(sequence, tokens)?;
        let mut last = 0;
        for chunk in tokens.chunks(self.scratch.chunk()) {
            forward::run(self, &mut [Part { sequence, tokens: chunk, wants_logits: true }]);
            last = chunk.len() - 1;
        }
        Ok(forward::logits(self, std::iter::once(last)))
    }

    /// One pass over tokens of several sequences, prompts and single tokens mixed; returns the logits `[wanted, V]`
    /// after the last token of each part that wants them, in order.
    ///
    /// A sequence gets the bits that [`Self::extend`] would give it alone. Nothing is allocated. On an error all
    /// sequences are as they were. Panics for a part without tokens.
    #[track_caller]
    pub fn step(&mut self, parts: &mut [Part<'_>]) -> Result<&[f32], EngineError> {
        let (mut tokens, mut logits) = (0, 0);
        for part in &*parts {
            assert!(!part.tokens.is_empty(), "step: a part without tokens");
            self.check(part.sequence, part.tokens)?;
            tokens += part.tokens.len();
            logits += usize::from(part.wants_logits);
        }
        let (chunk, sequences) = (self.chunk(), self.scratch.sequences());
        if tokens > chunk || logits > sequences {
            return Err(EngineError::Room { tokens, logits, chunk, sequences });
        }
        forward::run(self, parts);
        let mut row = 0;
        let last_rows = parts.iter().filter_map(|part| {
            row += part.tokens.len();
            part.wants_logits.then_some(row - 1)
        });
        Ok(forward::logits(self, last_rows))
    }

    /// Tokens that fit into one pass.
    pub fn chunk(&self) -> usize {
        self.scratch.chunk()
    }

    /// Sequences whose logits fit into one pass.
    pub fn sequences(&self) -> usize {
        self.scratch.sequences()
    }

    /// As [`Self::extend`], but hands out the logits after every token: `each(i, logits [V])`.
    pub fn extend_with_logits(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<(), EngineError> {
        self.check(sequence, tokens)?;
        let mut done = 0;
        for chunk in tokens.chunks(self.scratch.chunk()) {
            forward::run(self, &mut [Part { sequence, tokens: chunk, wants_logits: true }]);
            for i in 0..chunk.len() {
                each(done + i, forward::logits(self, std::iter::once(i)));
            }
            done += chunk.len();
        }
        Ok(())
    }

    fn check(&self, sequence: &Sequence, tokens: &[u32]) -> Result<(), EngineError> {
        let vocab_size = self.model().vocab_size;
        if let Some(place) = tokens.iter().position(|&t| t as usize >= vocab_size) {
            return Err(EngineError::Token { token: tokens[place], place, vocab_size });
        }
        if !sequence.fits(self.model(), &self.routing) {
            return Err(EngineError::Sequence);
        }
        Ok(())
    }
}
