//! Every op inside a composed net, against finite differences; kernels have their own tests, these are about the
//! wiring: which gradient goes to which input, and what is left out.

use sluice_kernels::output_head::{DistillTerms, RowWeights};
use sluice_kernels::rope::RopeStyle;
use sluice_kernels::routed_attention::PlacedRouting;
use sluice_kernels::top_k_routing::{self, Budget};
use sluice_tensor::{Device, Tensor};
use sluice_testkit::{Rng, assert_close, check_gradient, probe_weights};

use crate::{Param, Tape, Var};

/// Compare the gradients of all `inputs` of `sum(probe * net(inputs))` with central differences.
#[track_caller]
fn check(what: &str, inputs: &[Tensor], net: impl Fn(&Tape, &[Var]) -> Var) {
    let tape = Tape::recording();
    let leaves: Vec<Var> = inputs.iter().map(|t| tape.leaf(t.clone())).collect();
    let output = net(&tape, &leaves);
    let probe = probe_weights(output.value().len(), 77);
    let upstream = Tensor::from_vec(probe.clone(), output.value().shape());
    let gradients = tape.backward(&[(output, upstream)]);
    for (i, input) in inputs.iter().enumerate() {
        let gradient = gradients.of(&leaves[i]).unwrap_or_else(|| panic!("{what}: input {i} has no gradient"));
        check_gradient(&format!("{what}, input {i}"), input, gradient, 1e-2, 1e-2, 24, |moved| {
            let tape = Tape::frozen();
            let values: Vec<Var> =
                (0..inputs.len()).map(|j| tape.constant(if i == j { moved.clone() } else { inputs[j].clone() })).collect();
            net(&tape, &values).value().f32().iter().zip(&probe).map(|(y, p)| *y as f64 * *p as f64).sum()
        });
    }
}

/// Seeded inputs of these shapes, small enough that f32 differences stay accurate.
fn inputs<const N: usize>(seed: u64, shapes: [&[usize]; N]) -> [Tensor; N] {
    let mut rng = Rng::new(seed);
    shapes.map(|shape| {
        let mut t = rng.normal_tensor(shape);
        t.f32_mut().iter_mut().for_each(|v| *v *= 0.7);
        t
    })
}

fn routing(scores: &Tensor, lens: &[usize]) -> PlacedRouting {
    top_k_routing::route_in_place(scores, lens, &Budget { window: 3, top_k: 4, route_every: 2, n_sink: 1 })
}

#[test]
fn linear_gelu_linear() {
    check("linear", &inputs(1, [&[5, 6], &[7, 6], &[7], &[3, 7]]), |tape, v| {
        let hidden = tape.gelu(&tape.linear(&v[0], &v[1], Some(&v[2])));
        tape.linear(&hidden, &v[3], None)
    });
}

#[test]
fn norms_and_swiglu() {
    check("norms", &inputs(2, [&[4, 6], &[6], &[6], &[6], &[6, 6], &[6, 6]]), |tape, v| {
        let x = tape.rms_norm(&v[0], Some(&v[1]), 1e-5);
        let y = tape.swiglu(&tape.linear(&x, &v[4], None), &tape.linear(&x, &v[5], None));
        let y = tape.layer_norm(&tape.add(&y, &v[0]), &v[2], &v[3], 1e-5);
        tape.rms_norm(&y, None, 1e-5)
    });
}

#[test]
fn embedding_add_scale_reshape() {
    check("embedding", &inputs(3, [&[5, 4], &[4, 4]]), |tape, v| {
        let x = tape.embedding(&[0, 3, 3, 1], &v[0]);
        let y = tape.add(&tape.scale(&x, -1.5), &tape.linear(&x, &v[1], None));
        tape.gelu(&tape.reshape(&y, [2, 2, 4]))
    });
}

#[test]
fn rope_and_dense_attention() {
    for style in [RopeStyle::Interleaved, RopeStyle::HalfSplit] {
        check("dense attention", &inputs(4, [&[2, 6, 4, 4], &[2, 6, 2, 4], &[2, 6, 2, 4]]), move |tape, v| {
            let turn = |x: &Var| tape.rope(x, &[0, 1, 2, 3, 4, 5], &[1.0, 0.1], style);
            tape.dense_attention(&turn(&v[0]), &turn(&v[1]), &v[2], 0, &[6, 4])
        });
    }
}

#[test]
fn attention_of_an_encoder() {
    check("bidirectional attention", &inputs(14, [&[2, 6, 4, 4], &[2, 6, 2, 4], &[2, 6, 2, 4]]), |tape, v| {
        tape.bidirectional_attention(&v[0], &v[1], &v[2], &[6, 4])
    });
}

#[test]
fn gate_and_routed_attention() {
    let [x, gate, bias, recency, q, k, v] = inputs(5, [&[2, 11, 6], &[2, 6], &[2], &[2], &[2, 11, 4, 4], &[2, 11, 2, 4], &[2, 11, 2, 4]]);
    let positions: Vec<u32> = (0..11).collect();
    let lens = [11, 8];
    // The decision is a constant of the gradient, so it is made once.
    let tape = Tape::frozen();
    let c = |t: &Tensor| tape.constant(t.clone());
    let scores = tape.gate_score(&c(&x), &c(&gate), &c(&bias), &c(&recency), &positions, 1e-5);
    let routing = routing(scores.value(), &lens);
    check("routed attention with gate bias", &[x, gate, bias, recency, q.clone(), k.clone(), v.clone()], |tape, v| {
        let scores = tape.mark_sinks(&tape.gate_score(&v[0], &v[1], &v[2], &v[3], &positions, 1e-5), &positions, 1);
        tape.routed_attention(&v[4], &v[5], &v[6], Some((&scores, 0.5)), &routing)
    });
    check("routed attention", &[q, k, v], |tape, v| tape.routed_attention(&v[0], &v[1], &v[2], None, &routing));
}

#[test]
fn shift_free_passes_values_and_centres_gradients() {
    let t = 50;
    for lens in [vec![t], vec![t, t], vec![t, 31, 0]] {
        let shape = [lens.len(), t, 2];
        let x = Rng::new(8).normal_tensor(shape);
        let tape = Tape::recording();
        let leaf = tape.leaf(x.clone());
        let y = tape.shift_free(&leaf, &lens);
        assert_eq!(y.value().f32(), x.f32());
        let upstream = Rng::new(9).normal_tensor(shape);
        let gradients = tape.backward(&[(y, upstream.clone())]);
        let gradient = gradients.of(&leaf).unwrap().f32();
        for (sequence, &len) in lens.iter().enumerate() {
            for column in 0..2 {
                let of = |x: &[f32]| x[sequence * t * 2..][..t * 2].iter().skip(column).step_by(2).copied().collect::<Vec<f32>>();
                let (upstream, gradient) = (of(upstream.f32()), of(gradient));
                let mean = upstream[..len].iter().sum::<f32>() / len.max(1) as f32;
                for row in 0..t {
                    let expected = if row < len { upstream[row] - mean } else { 0.0 };
                    assert!((gradient[row] - expected).abs() < 1e-6, "row {row} of {len} in {lens:?}");
                }
            }
        }
    }
}

#[test]
fn losses() {
    let weights = [1.0, 0.5, 0.0, 2.0];
    check("cross entropy", &inputs(6, [&[4, 5], &[7, 5]]), |tape, v| {
        tape.scale(&tape.cross_entropy(&v[0], &v[1], &[0, 6, 2, 3], &weights).0, 0.5)
    });
    let [h_t, w_t] = inputs(7, [&[4, 3], &[7, 3]]);
    // A cap and a width beyond every margin keep the boundary loss smooth around these inputs.
    let terms =
        DistillTerms { kl: 1.0, ce: 0.3, boundary: 0.2, temperature: 1.5, margin_cap: 50.0, boundary_delta: 2.0, boundary_width: 2.0 };
    check("distill", &inputs(8, [&[4, 5], &[7, 5]]), |tape, v| {
        tape.distill(&v[0], &v[1], &h_t, &w_t, Some(&[0, 6, 2, 3]), &RowWeights::of(&weights, &Device::Cpu), terms).0
    });
    let [b] = inputs(9, [&[4, 5]]);
    let weights = Tensor::from_vec(weights.to_vec(), [4]);
    check("weighted_mse_rows", &inputs(10, [&[4, 5]]), |tape, v| tape.scale(&tape.weighted_mse_rows(&tape.gelu(&v[0]), &b, &weights), 3.0));
}

#[test]
fn mse_of_rows_is_relative_and_skips_rows_of_weight_zero() {
    let tape = Tape::recording();
    let a = tape.leaf(Tensor::from_vec(vec![2.0, 0.0, 1.0, 1.0], [2, 2]));
    let loss = tape.weighted_mse_rows(&a, &Tensor::from_vec(vec![1.0, 1.0, 0.0, 0.0], [2, 2]), &Tensor::from_vec(vec![3.0, 0.0], [2]));
    assert_eq!(loss.value().item(), 3.0);
    assert_eq!(tape.backward_scalar(&loss).of(&a).unwrap().f32(), [3.0, -3.0, 0.0, 0.0]);
}

#[test]
fn loss_equals_the_weighted_sum_of_its_rows() {
    let [h, w] = inputs(11, [&[4, 5], &[7, 5]]);
    let tape = Tape::frozen();
    let (loss, rows) = tape.cross_entropy(&tape.constant(h), &tape.constant(w), &[0, 6, 2, 3], &[1.0, 0.5, 0.0, 2.0]);
    let rows = rows.into_cross_entropy();
    assert_close("sum", &[loss.value().item()], &[rows.nll[0] + 0.5 * rows.nll[1] + 2.0 * rows.nll[3]], 1e-6);
}

/// Two layers of the real thing, from tokens to a loss.
struct Toy {
    params: Vec<Param>,
    tokens: Vec<u32>,
}

impl Toy {
    const T: usize = 12;
    const M: usize = 8;

    fn new(frozen: &[&str]) -> Self {
        let mut rng = Rng::new(20);
        let mut params = vec![];
        let mut add = |name: String, shape: &[usize]| {
            let mut value = rng.normal_tensor(shape);
            value.f32_mut().iter_mut().for_each(|v| *v *= 0.4);
            let trainable = !frozen.iter().any(|f| name.contains(f));
            params.push(Param { name, value, trainable });
        };
        add("embed".into(), &[9, Self::M]);
        for layer in 0..2 {
            for (name, shape) in [
                ("norm", &[8][..]),
                ("q", &[8, 8]),
                ("k", &[4, 8]),
                ("v", &[4, 8]),
                ("o", &[8, 8]),
                ("gate_weight", &[1, 8]),
                ("gate_bias", &[1]),
                ("gate_recency", &[1]),
                ("mlp_gate", &[16, 8]),
                ("mlp_up", &[16, 8]),
                ("mlp_down", &[8, 16]),
            ] {
                add(format!("{layer}.{name}"), shape);
            }
        }
        Self { params, tokens: (0..Self::T).map(|i| (i * 5 % 9) as u32).collect() }
    }

    fn param(params: &[Param], tape: &Tape, name: &str) -> Var {
        tape.param(params.iter().find(|p| p.name == name).unwrap_or_else(|| panic!("no parameter {name}")))
    }

    fn layer(params: &[Param], layer: usize, tape: &Tape, x: &Var, routing: &PlacedRouting) -> Var {
        let w = |name: &str| Self::param(params, tape, &format!("{layer}.{name}"));
        let positions: Vec<u32> = (0..Self::T as u32).collect();
        let h = tape.rms_norm(x, Some(&w("norm")), 1e-5);
        let heads = |name: &str, n: usize| {
            let y = tape.reshape(&tape.linear(&h, &w(name), None), [1, Self::T, n, 4]);
            if name == "v" { y } else { tape.rope(&y, &positions, &[1.0, 0.1], RopeStyle::HalfSplit) }
        };
        // Far apart, so that the recency slope has a gradient worth measuring.
        let ages: Vec<u32> = (0..Self::T as u32).map(|t| t * 300).collect();
        let scores = tape.gate_score(&h, &w("gate_weight"), &w("gate_bias"), &w("gate_recency"), &ages, 1e-5);
        let o = tape.routed_attention(&heads("q", 2), &heads("k", 1), &heads("v", 1), Some((&scores, 0.5)), routing);
        let x = tape.add(x, &tape.linear(&tape.reshape(&o, [1, Self::T, Self::M]), &w("o"), None));
        let mlp = tape.swiglu(&tape.linear(&x, &w("mlp_gate"), None), &tape.linear(&x, &w("mlp_up"), None));
        tape.add(&x, &tape.linear(&mlp, &w("mlp_down"), None))
    }

    fn loss(&self, tape: &Tape, checkpoint: bool) -> Var {
        let routing = routing(&Rng::new(21).normal_tensor([1, Self::T, 1]), &[Self::T]);
        let table = Self::param(&self.params, tape, "embed");
        let mut x = tape.reshape(&tape.embedding(&self.tokens, &table), [1, Self::T, Self::M]);
        for layer in 0..2 {
            x = if checkpoint {
                let (params, routing) = (self.params.clone(), routing.clone());
                tape.checkpoint(&[&x], move |tape, v| vec![Self::layer(&params, layer, tape, &v[0], &routing)]).remove(0)
            } else {
                Self::layer(&self.params, layer, tape, &x, &routing)
            };
        }
        // Tied: the head is the embedding, so its gradient has two parts.
        let h = tape.reshape(&x, [Self::T, Self::M]);
        tape.cross_entropy(&h, &table, &self.tokens, &[1.0; Self::T]).0
    }
}

#[test]
fn two_layer_net_with_tied_embedding_agrees_with_finite_differences() {
    let toy = Toy::new(&[]);
    let tape = Tape::recording();
    let gradients = tape.backward_scalar(&toy.loss(&tape, false));
    for (i, param) in toy.params.iter().enumerate() {
        let gradient = gradients.param(&param.name).unwrap_or_else(|| panic!("{} has no gradient", param.name));
        check_gradient(&param.name, &param.value, gradient, 1e-2, 2e-2, 12, |moved| {
            let mut params = toy.params.clone();
            params[i].value = moved.clone();
            Toy { params, tokens: toy.tokens.clone() }.loss(&Tape::frozen(), false).value().item() as f64
        });
    }
}

#[test]
fn checkpointed_net_has_the_same_gradients_bitwise() {
    let toy = Toy::new(&[]);
    let run = |checkpoint| {
        let tape = Tape::recording();
        let loss = toy.loss(&tape, checkpoint);
        (loss.value().item(), tape.backward_scalar(&loss).into_params())
    };
    let ((plain_loss, plain), (loss, checkpointed)) = (run(false), run(true));
    assert_eq!(plain_loss, loss);
    assert_eq!(plain.len(), toy.params.len());
    assert_eq!(plain.keys().collect::<Vec<_>>(), checkpointed.keys().collect::<Vec<_>>());
    for (name, gradient) in &plain {
        assert_eq!(gradient.f32(), checkpointed[name].f32(), "{name}");
    }
}

#[test]
fn frozen_weights_get_no_gradient_and_leave_the_others_alone() {
    let all = Tape::recording();
    let all = all.backward_scalar(&Toy::new(&[]).loss(&all, false));
    // Only the gates are trained; their gradient runs through the frozen layers above them.
    for checkpoint in [false, true] {
        let tape = Tape::recording();
        let frozen = ["embed", "norm", ".q", ".k", ".v", ".o", "mlp"];
        let gradients = tape.backward_scalar(&Toy::new(&frozen).loss(&tape, checkpoint)).into_params();
        assert_eq!(gradients.len(), 6);
        for (name, gradient) in &gradients {
            assert!(name.contains("gate_") && gradient.f32() == all.param(name).unwrap().f32(), "{name}");
        }
    }
}
