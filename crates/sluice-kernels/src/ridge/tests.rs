use sluice_testkit::Rng;

use super::*;

#[test]
fn sums_of_other_sizes_are_refused_and_change_nothing() {
    let mut sums = RidgeSums::new(3, 2);
    let mut rng = Rng::new(1);
    sums.add(&rng.normal_tensor([1, 9, 3]), 1e-5, &[0, 4, 8], &rng.normal_tensor([3, 2]));
    let before = sums.sums();
    assert!(!sums.set(Sums::zeros(4, 2)) && !sums.set(Sums::zeros(3, 1)));
    assert_eq!(sums.sums(), before);
}

#[test]
fn sums_survive_being_put_side_by_side() {
    let mut sums = RidgeSums::new(4, 3);
    let mut rng = Rng::new(2);
    sums.add(&rng.normal_tensor([1, 9, 4]), 1e-5, &[0, 4, 8], &rng.normal_tensor([3, 3]));
    let sums = sums.sums();
    assert_eq!(cuda::taken_apart(&cuda::side_by_side(&sums, 4, 3), 4, 3), sums);
}

#[test]
#[should_panic(expected = "ridge sums of 3 inputs and 2 labels")]
fn a_position_outside_the_rows_is_refused() {
    RidgeSums::new(3, 2).add(&Tensor::zeros([1, 4, 3]), 1e-5, &[4], &Tensor::zeros([1, 2]));
}
