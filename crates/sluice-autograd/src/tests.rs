//! Behaviour of the tape itself, on ops small enough to check by hand.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Mutex;

use sluice_tensor::{Tensor, memory};
use sluice_testkit::Rng;

use crate::{Param, Tape, Var};

fn vector(values: &[f32]) -> Tensor {
    Tensor::from_vec(values.to_vec(), [values.len()])
}

/// `x y` elementwise; counts how often its backward runs.
fn mul(tape: &Tape, x: &Var, y: &Var, runs: &Rc<Cell<usize>>) -> Var {
    let product = |a: &Tensor, b: &Tensor| Tensor::from_vec(a.f32().iter().zip(b.f32()).map(|(a, b)| a * b).collect(), a.shape());
    let (a, b, runs) = (x.value().clone(), y.value().clone(), runs.clone());
    tape.custom(&[x, y], product(x.value(), y.value()), move |dy| {
        runs.set(runs.get() + 1);
        vec![Some(product(dy, &b)), Some(product(dy, &a))]
    })
}

fn runs() -> Rc<Cell<usize>> {
    Rc::default()
}

#[test]
fn gradients_of_the_same_value_add_up() {
    let tape = Tape::recording();
    let x = tape.leaf(vector(&[2.0, 3.0]));
    let square = mul(&tape, &x, &x, &runs());
    let y = tape.add(&square, &x);
    let gradients = tape.backward(&[(y, vector(&[1.0, 10.0]))]);
    assert_eq!(gradients.of(&x).unwrap().f32(), [5.0, 70.0]);
}

#[test]
fn gradients_of_the_same_parameter_add_up_across_segments() {
    let w = Param { name: "w".into(), value: vector(&[3.0]), trainable: true };
    let tape = Tape::recording();
    let x = tape.leaf(vector(&[1.0]));
    let y = mul(&tape, &x, &tape.param(&w), &runs());
    let inside = w.clone();
    let y = tape.checkpoint(&[&y], move |tape, v| vec![mul(tape, &v[0], &tape.param(&inside), &runs())]).remove(0);
    let y = mul(&tape, &y, &tape.param(&w), &runs());
    let param = tape.param(&w);
    let gradients = tape.backward(&[(y, vector(&[1.0]))]);
    assert_eq!(gradients.of(&x).unwrap().f32(), [27.0]);
    assert_eq!(gradients.param("w").unwrap().f32(), [27.0]);
    assert_eq!(gradients.of(&param).unwrap().f32(), [27.0]);
}

#[test]
fn nothing_is_recorded_without_a_wanted_gradient() {
    let counter = runs();
    let frozen = Param { name: "w".into(), value: vector(&[3.0]), trainable: false };
    let tape = Tape::recording();
    let x = tape.leaf(vector(&[1.0]));
    let cut = mul(&tape, &tape.param(&frozen), &x.detach(), &counter);
    assert!(!tape.wants(&cut));
    let inference = Tape::frozen();
    let y = mul(&inference, &inference.leaf(vector(&[1.0])), &x, &counter);
    assert!(!inference.wants(&y));
    // Each op dropped its closure, which held the other owner of the counter.
    assert_eq!(Rc::strong_count(&counter), 1);
    assert!(tape.backward(&[(cut, vector(&[1.0]))]).into_params().is_empty());
}

#[test]
fn ops_that_the_roots_do_not_depend_on_are_skipped() {
    let (used, unused) = (runs(), runs());
    let tape = Tape::recording();
    let (x, lonely) = (tape.leaf(vector(&[2.0])), tape.leaf(vector(&[5.0])));
    let y = mul(&tape, &x, &x, &used);
    mul(&tape, &y, &lonely, &unused);
    let gradients = tape.backward(&[(y, vector(&[1.0]))]);
    assert_eq!((used.get(), unused.get()), (1, 0));
    assert!(gradients.of(&lonely).is_none());
    assert_eq!(gradients.of(&x).unwrap().f32(), [4.0]);
}

/// A pipeline: the second stage hands the gradient of its input to the first one.
#[test]
fn two_stages_equal_one() {
    let weights: Vec<Param> =
        (0..3).map(|i| Param { name: format!("w{i}"), value: Rng::new(i).normal_tensor([6, 6]), trainable: true }).collect();
    let x = Rng::new(9).normal_tensor([4, 6]);
    let seed = Rng::new(10).normal_tensor([4, 6]);
    let front = |tape: &Tape, x: &Var| {
        tape.gelu(&tape.linear(&tape.gelu(&tape.linear(x, &tape.param(&weights[0]), None)), &tape.param(&weights[1]), None))
    };
    let back = |tape: &Tape, x: &Var| tape.linear(x, &tape.param(&weights[2]), None);

    let tape = Tape::recording();
    let input = tape.leaf(x.clone());
    let output = back(&tape, &front(&tape, &input));
    let whole = tape.backward(&[(output, seed.clone())]);

    let (first, second) = (Tape::recording(), Tape::recording());
    let stage_input = first.leaf(x);
    let boundary = front(&first, &stage_input);
    let received = second.leaf(boundary.value().clone());
    let output = back(&second, &received);
    let second = second.backward(&[(output, seed)]);
    let first = first.backward(&[(boundary, second.of(&received).unwrap().clone())]);

    assert_eq!(first.of(&stage_input).unwrap().f32(), whole.of(&input).unwrap().f32());
    assert_eq!(second.param("w2").unwrap().f32(), whole.param("w2").unwrap().f32());
    for name in ["w0", "w1"] {
        assert_eq!(first.param(name).unwrap().f32(), whole.param(name).unwrap().f32(), "{name}");
    }
}

#[test]
fn several_roots_add_up() {
    let tape = Tape::recording();
    let x = tape.leaf(vector(&[2.0]));
    let (double, triple) = (tape.scale(&x, 2.0), tape.scale(&x, 3.0));
    let gradients = tape.backward(&[(double, vector(&[1.0])), (triple, vector(&[10.0])), (x.clone(), vector(&[100.0]))]);
    assert_eq!(gradients.of(&x).unwrap().f32(), [132.0]);
}

#[test]
fn checkpoint_runs_twice_and_passes_constants_through() {
    let (forward, backward) = (runs(), runs());
    let tape = Tape::recording();
    let (x, c) = (tape.leaf(vector(&[3.0])), tape.constant(vector(&[5.0])));
    let (f, b) = (forward.clone(), backward.clone());
    let outputs = tape.checkpoint(&[&x, &c], move |tape, v| {
        f.set(f.get() + 1);
        let square = mul(tape, &v[0], &v[0], &b);
        // An output, an input, a constant, and an output that the loss does not use.
        vec![mul(tape, &square, &v[1], &b), v[0].clone(), v[1].clone(), tape.scale(&square, 2.0)]
    });
    assert_eq!((forward.get(), backward.get()), (1, 0));
    assert!(tape.wants(&outputs[0]) && tape.wants(&outputs[1]) && !tape.wants(&outputs[2]));
    let y = tape.add(&outputs[0], &outputs[1]);
    let gradients = tape.backward(&[(y, vector(&[1.0]))]);
    assert_eq!((forward.get(), backward.get()), (2, 2));
    assert_eq!(gradients.of(&x).unwrap().f32(), [31.0]);
}

#[test]
fn nested_checkpoints_give_the_same_gradient() {
    let tape = Tape::recording();
    let x = tape.leaf(vector(&[2.0]));
    let y = tape
        .checkpoint(&[&x], |tape, v| {
            let inner = tape.checkpoint(&[&v[0]], |tape, v| vec![mul(tape, &v[0], &v[0], &runs())]);
            vec![mul(tape, &inner[0], &v[0], &runs())]
        })
        .remove(0);
    assert_eq!(tape.backward(&[(y, vector(&[1.0]))]).of(&x).unwrap().f32(), [12.0]);
}

/// Sums that begin outside a segment go on inside it in the order that they would have without it.
#[test]
fn a_value_used_in_and_around_a_segment_has_the_same_gradient_bitwise() {
    let mut rng = Rng::new(30);
    let x = rng.normal_tensor([1000]);
    let others: Vec<Tensor> = (0..4).map(|_| rng.normal_tensor([1000])).collect();
    let run = |checkpoint: bool| {
        let tape = Tape::recording();
        let leaf = tape.leaf(x.clone());
        let part = |tape: &Tape, x: &Var, i: usize, others: &[Tensor]| mul(tape, x, &tape.constant(others[i].clone()), &runs());
        let before = part(&tape, &leaf, 0, &others);
        let inside = others.clone();
        let middle = move |tape: &Tape, v: &[Var]| vec![tape.add(&part(tape, &v[0], 1, &inside), &part(tape, &v[0], 2, &inside))];
        let middle = if checkpoint { tape.checkpoint(&[&leaf], middle) } else { middle(&tape, std::slice::from_ref(&leaf)) }.remove(0);
        let after = part(&tape, &leaf, 3, &others);
        let y = tape.add(&tape.add(&before, &middle), &after);
        tape.backward(&[(y, others[0].clone())]).of(&leaf).unwrap().clone()
    };
    assert_eq!(run(false).f32(), run(true).f32());
}

/// Memory is counted for the whole process, so its tests take turns.
static MEMORY: Mutex<()> = Mutex::new(());

/// Peak bytes above the start of forward and backward through 16 layers, and bytes left afterwards.
fn peak_of_stack(checkpoint: bool) -> usize {
    const N: usize = 1 << 20;
    let weights: Vec<Param> =
        (0..16).map(|i| Param { name: format!("w{i}"), value: Tensor::full(0.01, [8, 8]), trainable: true }).collect();
    let start = memory::current_bytes();
    memory::reset_peak();
    let tape = Tape::recording();
    let mut x = tape.leaf(Tensor::full(0.5, [N / 8, 8]));
    for w in weights {
        let layer = move |tape: &Tape, v: &[Var]| {
            let h = tape.rms_norm(&tape.linear(&v[0], &tape.param(&w), None), None, 1e-5);
            vec![tape.add(&tape.gelu(&tape.gelu(&h)), &v[0])]
        };
        x = if checkpoint { tape.checkpoint(&[&x], layer) } else { layer(&tape, &[x]) }.remove(0);
    }
    let seed = Tensor::full(1.0, x.value().shape());
    let gradients = tape.backward(&[(x, seed)]);
    assert_eq!(gradients.into_params().len(), 16);
    (memory::peak_bytes() - start) / (N * 4)
}

#[test]
fn checkpoint_lowers_the_peak() {
    let _turn = MEMORY.lock().unwrap();
    let (plain, checkpointed) = (peak_of_stack(false), peak_of_stack(true));
    // In activations: 16 layers of 4 against 16 inputs and one layer.
    assert!(plain >= 60, "{plain} activations without checkpoints");
    assert!(checkpointed <= 30, "{checkpointed} activations with checkpoints");
}

#[test]
fn backward_frees_as_it_goes_and_leaves_only_the_gradients() {
    let _turn = MEMORY.lock().unwrap();
    const BYTES: usize = 4 << 20;
    let before = memory::current_bytes();
    let tape = Tape::recording();
    let x = tape.leaf(Tensor::full(0.5, [1 << 20]));
    let mut y = x.clone();
    for _ in 0..20 {
        y = tape.gelu(&y);
    }
    let seed = Tensor::full(1.0, y.value().shape());
    let forward = memory::current_bytes() - before;
    memory::reset_peak();
    let root = [(y, seed)];
    let gradients = tape.backward(&root);
    // Each step adds one gradient and frees one activation: the peak is one gradient above the forward pass.
    assert!(memory::peak_bytes() - before < forward + BYTES + BYTES / 4, "{} activations", (memory::peak_bytes() - before) / BYTES);
    drop(root);
    let left = memory::current_bytes() - before;
    // Tests that run beside this one hold a few kilobytes.
    assert!(left < 2 * BYTES + BYTES / 4, "{left} bytes left, expected x and its gradient");
    assert!(gradients.of(&x).is_some());
}

#[test]
#[should_panic(expected = "this tape has run backward")]
fn a_spent_tape_refuses_to_record() {
    let tape = Tape::recording();
    let x = tape.leaf(vector(&[1.0]));
    tape.backward(&[(x.clone(), vector(&[1.0]))]);
    tape.scale(&x, 2.0);
}

#[test]
#[should_panic(expected = "belongs to another tape")]
fn a_value_of_another_tape_is_refused() {
    let (a, b) = (Tape::recording(), Tape::recording());
    let (x, y) = (a.leaf(vector(&[1.0])), b.leaf(vector(&[1.0])));
    a.add(&x, &y);
}

#[test]
#[should_panic(expected = "pass it as an input of the checkpoint")]
fn a_value_captured_by_a_segment_is_refused() {
    let tape = Tape::recording();
    let x = tape.leaf(vector(&[1.0]));
    let captured = x.clone();
    tape.checkpoint(&[&x], move |tape, v| vec![tape.add(&v[0], &captured)]);
}

#[test]
#[should_panic(expected = "two different parameters are named `w`")]
fn two_parameters_with_one_name_are_refused() {
    let tape = Tape::recording();
    let param = || Param { name: "w".into(), value: vector(&[1.0]), trainable: true };
    tape.param(&param());
    tape.param(&param());
}

#[test]
#[should_panic(expected = "gradient of another shape")]
fn a_gradient_of_another_shape_is_refused() {
    let tape = Tape::recording();
    let x = tape.leaf(vector(&[1.0, 2.0]));
    let y = tape.custom(&[&x], vector(&[1.0]), |dy| vec![Some(dy.clone())]);
    tape.backward(&[(y, vector(&[1.0]))]);
}
