use super::*;
use crate::output_head::{Wanted, queue_cross_entropy};

#[test]
#[should_panic(expected = "token_weights of 2 rows with 2 draws, documents of [1] rows")]
fn documents_must_cover_all_rows() {
    let (h, w) = (Tensor::zeros([2, 1]), Tensor::zeros([3, 1]));
    let weights = RowWeights::of(&[1.0, 1.0], &sluice_tensor::Device::Cpu);
    let teacher = queue_cross_entropy(&h, &w, &[0, 1], &weights, Wanted::NOTHING);
    fwd(&teacher, None, &[0.1, 0.2], &[1], &Terms { sure: 0.7, share: 0.3, far_gain: 2.0, far_weight: 5.0 });
}
