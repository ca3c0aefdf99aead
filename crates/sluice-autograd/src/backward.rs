//! The walk backwards: nodes are taken off the tape's end, and everything that a node kept alive is freed before
//! the next one runs. The order of additions is the reverse of the recording, hence always the same.

use std::collections::{BTreeMap, HashMap};

use sluice_kernels::add;
use sluice_tensor::Tensor;

use crate::tape::{Op, Source, Tape, Var};

/// What a backward pass found: gradients of leaves and of parameters.
pub struct Gradients {
    tape: u64,
    leaves: HashMap<usize, Tensor>,
    params: BTreeMap<String, Tensor>,
    param_names: HashMap<usize, String>,
}

impl Gradients {
    /// Gradient of a [`Tape::leaf`] or of a parameter's `Var`; `None` when nothing depended on it, and for values in
    /// between, whose gradients are freed on the way.
    pub fn of(&self, var: &Var) -> Option<&Tensor> {
        match var.source {
            Source::Value { tape, id } if tape == self.tape => match self.param_names.get(&id) {
                Some(name) => self.params.get(name),
                None => self.leaves.get(&id),
            },
            _ => None,
        }
    }

    /// Gradient of the parameter with this name.
    pub fn param(&self, name: &str) -> Option<&Tensor> {
        self.params.get(name)
    }

    /// All parameter gradients by name.
    pub fn into_params(self) -> BTreeMap<String, Tensor> {
        self.params
    }
}

impl Tape {
    /// Gradients from the given ones of some values; the tape is spent afterwards. A value that needs no gradient
    /// is passed over.
    #[track_caller]
    pub fn backward(&self, from: &[(Var, Tensor)]) -> Gradients {
        let Some(tape) = self.id() else { panic!("backward() on a tape that does not record") };
        let roots = from.iter().map(|(var, gradient)| (self.value_id(var), gradient.clone())).collect();
        let mut params = BTreeMap::new();
        let (leaves, param_names) = self.walk(roots, vec![], &mut params);
        Gradients { tape, leaves, params, param_names }
    }

    /// Gradients of a loss with one element.
    #[track_caller]
    pub fn backward_scalar(&self, loss: &Var) -> Gradients {
        assert_eq!(loss.value().len(), 1, "backward_scalar() of a value of shape {:?}", loss.value().shape());
        self.backward(&[(loss.clone(), Tensor::full(1.0, loss.value().shape()).to(&loss.value().device()))])
    }

    /// Walk back from `roots` (value and gradient); returns the gradients of the leaves and the names of the
    /// parameters by value id. `initial` holds sums that some leaves start from, `params` those of the parameters: a
    /// segment that runs inside another tape's walk continues the sums of that tape, in the order that it would
    /// have used without the segment.
    #[track_caller]
    pub(crate) fn walk(
        &self,
        roots: Vec<(Option<usize>, Tensor)>,
        initial: Vec<(usize, Tensor)>,
        params: &mut BTreeMap<String, Tensor>,
    ) -> (HashMap<usize, Tensor>, HashMap<usize, String>) {
        let mut recorded = std::mem::take(&mut *self.recorded().borrow_mut());
        assert!(!recorded.spent, "this tape has run backward before; a tape is walked once");
        self.recorded().borrow_mut().spent = true;

        let mut sums: Vec<Option<Tensor>> = vec![None; recorded.shapes.len()];
        for (id, gradient) in initial {
            sums[id] = Some(gradient);
        }
        let add = |sums: &mut [Option<Tensor>],
                   params: &mut BTreeMap<String, Tensor>,
                   id: usize,
                   gradient: Tensor,
                   from: &dyn std::fmt::Display| {
            assert_eq!(gradient.shape(), recorded.shapes[id], "{from} gave a gradient of another shape than its value's");
            match recorded.param_names.get(&id) {
                Some(name) => add_to_param(params, name, gradient),
                None => accumulate(&mut sums[id], gradient.to_dtype(recorded.formats[id])),
            }
        };
        for (id, gradient) in roots {
            if let Some(id) = id {
                add(&mut sums, params, id, gradient, &"the caller of backward");
            }
        }

        let mut leaves = HashMap::new();
        while let Some(node) = recorded.nodes.pop() {
            let mut upstream = sums.split_off(node.first_output);
            if upstream.iter().all(Option::is_none) {
                continue;
            }
            match node.op {
                Op::Param => unreachable!("gradients of parameters are summed by name"),
                Op::Leaf => {
                    leaves.insert(node.first_output, upstream.remove(0).expect("not all are none"));
                }
                Op::Function(_) | Op::Onto(_) => {
                    let upstream = upstream.remove(0).expect("not all are none");
                    let gradients = match node.op {
                        Op::Onto(backward) => {
                            let before = node.inputs[0].and_then(|id| sums[id].take());
                            backward(&upstream, before)
                        }
                        Op::Function(backward) => backward(&upstream),
                        _ => unreachable!("matched above"),
                    };
                    // Now an op that handed its upstream gradient on has made its input the only owner.
                    drop(upstream);
                    assert_eq!(
                        gradients.len(),
                        node.inputs.len(),
                        "the op recorded at {} gave the wrong number of gradients",
                        node.location
                    );
                    for (input, gradient) in node.inputs.iter().zip(gradients) {
                        if let (Some(id), Some(gradient)) = (*input, gradient) {
                            add(&mut sums, params, id, gradient, node.location);
                        }
                    }
                }
                Op::InPlace(add_to) => {
                    let upstream = upstream.remove(0).expect("not all are none");
                    let id = node.inputs[0].expect("an op without wanted inputs is not recorded");
                    let zeros = || Tensor::zeros_on(&upstream.device(), recorded.shapes[id].clone());
                    add_to(
                        &upstream,
                        match recorded.param_names.get(&id) {
                            Some(name) => params.entry(name.clone()).or_insert_with(zeros),
                            None => sums[id].get_or_insert_with(zeros),
                        },
                    );
                }
                Op::Segment(segment) => {
                    let started: Vec<Option<Tensor>> = node.inputs.iter().map(|id| id.and_then(|id| sums[id].take())).collect();
                    let finished = segment.backward(upstream, started, params);
                    for (input, gradient) in node.inputs.iter().zip(finished) {
                        if let (Some(id), Some(gradient)) = (*input, gradient) {
                            add(&mut sums, params, id, gradient, node.location);
                        }
                    }
                }
            }
        }
        (leaves, recorded.param_names)
    }
}

fn add_to_param(params: &mut BTreeMap<String, Tensor>, name: &str, gradient: Tensor) {
    match params.get_mut(name) {
        Some(sum) => add::assign(sum, &gradient),
        None => {
            params.insert(name.to_owned(), gradient);
        }
    }
}

fn accumulate(sum: &mut Option<Tensor>, gradient: Tensor) {
    match sum {
        Some(sum) => add::assign(sum, &gradient),
        None => *sum = Some(gradient),
    }
}
