//! Checkpoint segments: trade a second forward run for the memory of everything inside (Chen et al. 2016,
//! "Training deep nets with sublinear memory cost").
//!
//! A segment runs first as a rehearsal that records nothing but notes which outputs will need a gradient, and again,
//! recording, when the backward pass reaches it. Its sums of gradients continue those of the tape around it, so the
//! result is the same, bit for bit, as without the segment.

use std::collections::BTreeMap;

use sluice_tensor::Tensor;

use crate::tape::{Source, Tape, Var};

type Run = dyn Fn(&Tape, &[Var]) -> Vec<Var>;

/// What runs again.
pub(crate) struct Segment {
    /// Values of the inputs, and whether a gradient of them is wanted.
    inputs: Vec<(Tensor, bool)>,
    run: Box<Run>,
    /// Which outputs of `run` have a place on the outer tape.
    live: Vec<bool>,
}

impl Tape {
    /// Run `f` now without recording, and once more in the backward pass. Parameters that `f` uses get their
    /// gradients too. `f` must compute the same values both times and may use no values of this tape except
    /// its inputs.
    #[track_caller]
    pub fn checkpoint(&self, inputs: &[&Var], f: impl Fn(&Tape, &[Var]) -> Vec<Var> + 'static) -> Vec<Var> {
        if !self.is_recording() {
            let inputs: Vec<Var> = inputs.iter().map(|&v| v.clone()).collect();
            return f(self, &inputs);
        }
        let wanted: Vec<(Tensor, bool)> = inputs.iter().map(|v| (v.value().clone(), self.wants(v))).collect();
        let rehearsal = Tape::rehearsal();
        let outputs = f(&rehearsal, &vars(&rehearsal, &wanted));
        let live: Vec<bool> = outputs.iter().map(|v| v.source == Source::Later).collect();
        if !live.contains(&true) {
            return outputs;
        }
        self.record_segment(inputs, outputs, Segment { inputs: wanted, run: Box::new(f), live })
    }
}

impl Segment {
    /// Run again, recording, and walk back from `upstream` (one entry per live output). `started` are the sums of
    /// the inputs' gradients so far; returns them with this segment's share added.
    pub(crate) fn backward(
        self,
        upstream: Vec<Option<Tensor>>,
        started: Vec<Option<Tensor>>,
        params: &mut BTreeMap<String, Tensor>,
    ) -> Vec<Option<Tensor>> {
        let tape = Tape::recording();
        let inputs = vars(&tape, &self.inputs);
        let outputs = (self.run)(&tape, &inputs);
        assert_eq!(outputs.len(), self.live.len(), "a checkpoint segment returned another number of values when it ran again");
        let ids: Vec<Option<usize>> = inputs.iter().map(|v| tape.value_id(v)).collect();
        let roots = outputs
            .iter()
            .zip(&self.live)
            .filter(|(_, live)| **live)
            .zip(upstream)
            .filter_map(|((output, _), gradient)| Some((tape.value_id(output), gradient?)))
            .collect();
        let initial = ids.iter().zip(started).filter_map(|(id, sum)| Some(((*id)?, sum?))).collect();
        // The values live on inside the nodes that need them; holding them here would keep the rest too.
        drop((inputs, outputs, self.inputs, self.run));
        let (mut leaves, _) = tape.walk(roots, initial, params);
        ids.into_iter().map(|id| leaves.remove(&id?)).collect()
    }
}

fn vars(tape: &Tape, inputs: &[(Tensor, bool)]) -> Vec<Var> {
    inputs.iter().map(|(value, wanted)| if *wanted { tape.leaf(value.clone()) } else { tape.constant(value.clone()) }).collect()
}
