//! The tape, the values on it, and the one primitive that records.

use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::Location;
use std::sync::atomic::{AtomicU64, Ordering};

use sluice_tensor::{DType, Tensor};

use crate::checkpoint::Segment;

/// A named weight.
#[derive(Clone, Debug)]
pub struct Param {
    /// Its name in the checkpoint; gradients are found under it.
    pub name: String,
    /// The weight.
    pub value: Tensor,
    /// Whether it gets a gradient.
    pub trainable: bool,
}

/// A value that a tape produced. Cloning is cheap and means the same value.
#[derive(Clone, Debug)]
pub struct Var {
    value: Tensor,
    pub(crate) source: Source,
}

/// Where the gradient of a value goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Nowhere.
    Constant,
    /// Somewhere, once the checkpoint segment that is being run for its values runs again.
    Later,
    /// To this value of this tape.
    Value { tape: u64, id: usize },
}

impl Var {
    /// The tensor.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The same value, cut off: no gradient flows through it.
    pub fn detach(&self) -> Self {
        Self { value: self.value.clone(), source: Source::Constant }
    }

    pub(crate) fn new(value: Tensor, source: Source) -> Self {
        Self { value, source }
    }
}

/// Records the ops on values that need a gradient, in order; [`Tape::backward`] walks them in reverse, once.
///
/// An op that is not recorded keeps none of its inputs alive, so the same forward code serves inference.
pub struct Tape {
    mode: Mode,
    recorded: RefCell<Recorded>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Frozen,
    /// Records nothing, but follows which values will need a gradient: the first run of a checkpoint segment.
    Rehearsal,
    Recording {
        tape: u64,
    },
}

/// What a tape holds for its backward pass.
#[derive(Default)]
pub(crate) struct Recorded {
    pub(crate) nodes: Vec<Node>,
    /// Shape of every value, by id.
    pub(crate) shapes: Vec<Vec<usize>>,
    /// Its format, which is its gradient's too.
    pub(crate) formats: Vec<DType>,
    /// Value id and tensor of each parameter used so far.
    params: HashMap<String, (usize, Tensor)>,
    /// The names again, by value id.
    pub(crate) param_names: HashMap<usize, String>,
    pub(crate) spent: bool,
}

pub(crate) struct Node {
    /// Ids of the outputs are `first_output..` the next node's.
    pub(crate) first_output: usize,
    /// Value ids; `None` for constants.
    pub(crate) inputs: Vec<Option<usize>>,
    pub(crate) op: Op,
    /// Where it was recorded, for messages.
    pub(crate) location: &'static Location<'static>,
}

/// From the gradient of an op's output to those of its inputs.
pub(crate) type Backward = Box<dyn FnOnce(&Tensor) -> Vec<Option<Tensor>>>;

/// [`Backward`] that also gets what the first input's gradient is so far, and returns it with its share added.
pub(crate) type BackwardOnto = Box<dyn FnOnce(&Tensor, Option<Tensor>) -> Vec<Option<Tensor>>>;

/// From the gradient of an op's output to its one input's, added to what that has so far.
pub(crate) type AddTo = Box<dyn FnOnce(&Tensor, &mut Tensor)>;

pub(crate) enum Op {
    Leaf,
    Param,
    Function(Backward),
    Onto(BackwardOnto),
    InPlace(AddTo),
    Segment(Segment),
}

impl Tape {
    /// A tape that records.
    pub fn recording() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self::with_mode(Mode::Recording { tape: NEXT.fetch_add(1, Ordering::Relaxed) })
    }

    /// A tape that records nothing: for inference and for teachers.
    pub fn frozen() -> Self {
        Self::with_mode(Mode::Frozen)
    }

    pub(crate) fn rehearsal() -> Self {
        Self::with_mode(Mode::Rehearsal)
    }

    fn with_mode(mode: Mode) -> Self {
        Self { mode, recorded: RefCell::default() }
    }

    /// Whether it records.
    pub fn is_recording(&self) -> bool {
        matches!(self.mode, Mode::Recording { .. })
    }

    /// A value without gradient.
    pub fn constant(&self, value: Tensor) -> Var {
        Var::new(value, Source::Constant)
    }

    /// An input whose gradient is wanted: [`Gradients::of`](crate::Gradients::of) this `Var`.
    #[track_caller]
    pub fn leaf(&self, value: Tensor) -> Var {
        match self.mode {
            Mode::Frozen => self.constant(value),
            Mode::Rehearsal => Var::new(value, Source::Later),
            Mode::Recording { tape } => {
                let id = self.push(vec![], &[&value], Op::Leaf);
                Var::new(value, Source::Value { tape, id })
            }
        }
    }

    /// A weight; a constant unless it is trainable. Using it again, here or inside a checkpoint segment, adds to
    /// the same gradient.
    #[track_caller]
    pub fn param(&self, param: &Param) -> Var {
        let value = param.value.clone();
        match self.mode {
            _ if !param.trainable => self.constant(value),
            Mode::Frozen => self.constant(value),
            Mode::Rehearsal => Var::new(value, Source::Later),
            Mode::Recording { tape } => {
                let known = self.recorded.borrow().params.get(&param.name).map(|(id, first)| (*id, first.shares_storage_with(&value)));
                let id = match known {
                    Some((id, same)) => {
                        assert!(same, "two different parameters are named `{}`", param.name);
                        id
                    }
                    None => {
                        let id = self.push(vec![], &[&value], Op::Param);
                        let mut recorded = self.recorded.borrow_mut();
                        recorded.params.insert(param.name.clone(), (id, value.clone()));
                        recorded.param_names.insert(id, param.name.clone());
                        id
                    }
                };
                Var::new(value, Source::Value { tape, id })
            }
        }
    }

    /// Whether a gradient of `var` will be asked for on this tape; ops skip work that nobody wants.
    #[track_caller]
    pub fn wants(&self, var: &Var) -> bool {
        self.is_recording() && self.source_here(var) != Source::Constant
    }

    /// [`Self::custom`] for an op whose gradient touches little of its input: `add` adds it to the sum so far, instead
    /// of making a tensor that is mostly zero.
    #[track_caller]
    pub fn custom_in_place(&self, input: &Var, output: Tensor, add: impl FnOnce(&Tensor, &mut Tensor) + 'static) -> Var {
        self.record(&[input], output, || Op::InPlace(Box::new(add)))
    }

    /// The primitive that all other ops use: `output` was computed from `inputs`, and `backward` turns its gradient into
    /// theirs, in order. Entries for inputs that want no gradient may be `None` and are ignored otherwise.
    /// When no input wants one, `backward` is dropped at once.
    #[track_caller]
    pub fn custom(&self, inputs: &[&Var], output: Tensor, backward: impl FnOnce(&Tensor) -> Vec<Option<Tensor>> + 'static) -> Var {
        self.record(inputs, output, || Op::Function(Box::new(backward)))
    }

    /// [`Self::custom`] for an op that can add to the gradient of its first input in place: `backward` gets what that is so far and
    /// returns it with its share added, which spares a pass over both.
    #[track_caller]
    pub fn custom_onto(
        &self,
        inputs: &[&Var],
        output: Tensor,
        backward: impl FnOnce(&Tensor, Option<Tensor>) -> Vec<Option<Tensor>> + 'static,
    ) -> Var {
        self.record(inputs, output, || Op::Onto(Box::new(backward)))
    }

    #[track_caller]
    fn record(&self, inputs: &[&Var], output: Tensor, op: impl FnOnce() -> Op) -> Var {
        // Every input is looked at, so that one from another tape is noticed behind any other.
        let n_wanted = inputs.iter().filter(|v| self.source_here(v) != Source::Constant).count();
        let source = match self.mode {
            _ if n_wanted == 0 => Source::Constant,
            Mode::Frozen => unreachable!("a frozen tape takes every value as a constant"),
            Mode::Rehearsal => Source::Later,
            Mode::Recording { tape } => {
                let id = self.push(ids(inputs), &[&output], op());
                Source::Value { tape, id }
            }
        };
        Var::new(output, source)
    }

    /// Record a segment with several outputs, those that need a gradient.
    #[track_caller]
    pub(crate) fn record_segment(&self, inputs: &[&Var], outputs: Vec<Var>, segment: Segment) -> Vec<Var> {
        let Mode::Recording { tape } = self.mode else { panic!("only a recording tape holds segments") };
        let live: Vec<&Tensor> = outputs.iter().filter(|v| v.source == Source::Later).map(Var::value).collect();
        let first = self.push(ids(inputs), &live, Op::Segment(segment));
        let mut fresh = (first..).map(|id| Source::Value { tape, id });
        outputs
            .into_iter()
            .map(|v| match v.source {
                Source::Later => Var::new(v.value, fresh.next().expect("an endless range")),
                _ => v.detach(),
            })
            .collect()
    }

    /// Where the gradient of `var` goes, checked to be on this tape.
    #[track_caller]
    pub(crate) fn source_here(&self, var: &Var) -> Source {
        match (var.source, self.mode) {
            (Source::Constant, _) | (Source::Later, Mode::Rehearsal) => {}
            (Source::Value { tape: theirs, .. }, Mode::Recording { tape: ours }) if theirs == ours => {}
            // A frozen tape only wants the value.
            (_, Mode::Frozen) => return Source::Constant,
            _ => panic!(
                "a value of shape {:?} belongs to another tape; pass it as an input of the checkpoint, or detach() it",
                var.value.shape()
            ),
        }
        var.source
    }

    /// Id of a value on this tape; `None` when it needs no gradient.
    #[track_caller]
    pub(crate) fn value_id(&self, var: &Var) -> Option<usize> {
        match self.source_here(var) {
            Source::Value { id, .. } => Some(id),
            _ => None,
        }
    }

    /// The number of a recording tape.
    pub(crate) fn id(&self) -> Option<u64> {
        match self.mode {
            Mode::Recording { tape } => Some(tape),
            _ => None,
        }
    }

    pub(crate) fn recorded(&self) -> &RefCell<Recorded> {
        &self.recorded
    }

    /// Append a node; returns the id of its first output.
    #[track_caller]
    fn push(&self, inputs: Vec<Option<usize>>, outputs: &[&Tensor], op: Op) -> usize {
        let mut recorded = self.recorded.borrow_mut();
        assert!(!recorded.spent, "this tape has run backward and is spent; record on a new one");
        let first_output = recorded.shapes.len();
        recorded.shapes.extend(outputs.iter().map(|t| t.shape().to_vec()));
        recorded.formats.extend(outputs.iter().map(|t| t.dtype()));
        recorded.nodes.push(Node { first_output, inputs, op, location: Location::caller() });
        first_output
    }
}

fn ids(inputs: &[&Var]) -> Vec<Option<usize>> {
    inputs
        .iter()
        .map(|v| match v.source {
            Source::Value { id, .. } => Some(id),
            _ => None,
        })
        .collect()
}
