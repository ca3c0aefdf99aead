use sluice_tensor::{Device, Tensor};

use super::*;

#[test]
fn every_case_passes_on_the_cpu() {
    let mut outcomes = Vec::new();
    run(&Device::Cpu, Only::default(), |outcome| outcomes.push(outcome));
    assert!(outcomes.len() > 100, "only {} comparisons", outcomes.len());
    let failed: Vec<&Outcome> = outcomes.iter().filter(|o| !o.passes()).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn a_case_can_be_run_alone() {
    let mut names = Vec::new();
    run(&Device::Cpu, Only { op: Some("swiglu"), case: Some("[63]") }, |outcome| names.push(outcome.case));
    names.dedup();
    assert_eq!(names, ["[63] F32"]);
}

#[test]
fn a_wrong_a_missing_and_an_unwritten_output_are_noticed() {
    let mut outcomes = Vec::new();
    let mut report = |outcome: Outcome| outcomes.push(outcome.passes());
    let mut check = Check::new(&Device::Cpu, None, &mut report);
    check.compare("right", &Tensor::from_vec(vec![1.0, 20.0], [2]), &[1.0, 20.0001], 1e-5);
    check.compare("wrong", &Tensor::from_vec(vec![1.0, 20.0], [2]), &[1.0, 20.1], 1e-5);
    check.compare("short", &Tensor::from_vec(vec![1.0], [1]), &[1.0, 2.0], 1.0);
    check.compare("unwritten", &Tensor::from_vec(vec![1.0, f32::NAN], [2]), &[1.0, 2.0], 1.0);
    check.require("broken", false);
    assert_eq!(outcomes, [true, false, false, false, false]);
}
