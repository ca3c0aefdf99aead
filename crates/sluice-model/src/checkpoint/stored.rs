//! One tensor inside a file: where it lies, how its elements are encoded, and how to read it in
//! parallel. Knows nothing about the container around it.

use half::bf16;
use rayon::prelude::*;
use sluice_tensor::Tensor;

use super::CheckpointError;
use super::file::SizedFile;
use super::gguf_blocks::{BlockFormat, dequantise};

/// Elements that one task reads and converts; a multiple of every block length.
const CHUNK: usize = 1 << 18;

/// Place and encoding of a tensor whose bytes are known to lie inside its file.
#[derive(Clone, Debug)]
pub(super) struct StoredTensor {
    pub(super) shape: Vec<usize>,
    pub(super) format: BlockFormat,
    /// First byte, from the start of the file.
    pub(super) offset: u64,
}

impl StoredTensor {
    /// Bytes of `shape` in `format`, or `None` when the size overflows or the rows are not whole blocks.
    pub(super) fn byte_len(shape: &[usize], format: BlockFormat) -> Option<u64> {
        let n = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(format.block_len()) {
            return None;
        }
        (n / format.block_len()).checked_mul(format.block_bytes()).map(|b| b as u64)
    }

    /// Read the tensor: bf16 stays bf16, everything else becomes f32.
    pub(super) fn read(&self, file: &SizedFile) -> Result<Tensor, CheckpointError> {
        let n: usize = self.shape.iter().product();
        let at = |chunk: usize| self.offset + (chunk * CHUNK / self.format.block_len() * self.format.block_bytes()) as u64;
        let byte_len = |len: usize| len / self.format.block_len() * self.format.block_bytes();
        if self.format == BlockFormat::Bf16 {
            let mut data = vec![bf16::ZERO; n];
            data.par_chunks_mut(CHUNK).enumerate().try_for_each(|(c, out)| {
                let mut bytes = vec![0; byte_len(out.len())];
                file.read_at(at(c), &mut bytes)?;
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = bf16::from_le_bytes(*b);
                }
                Ok(())
            })?;
            return Ok(Tensor::from_bf16_vec(data, self.shape.clone()));
        }
        let mut data = vec![0.0f32; n];
        data.par_chunks_mut(CHUNK).enumerate().try_for_each(|(c, out)| {
            let mut bytes = vec![0; byte_len(out.len())];
            file.read_at(at(c), &mut bytes)?;
            dequantise(self.format, &bytes, out);
            Ok(())
        })?;
        Ok(Tensor::from_vec(data, self.shape.clone()))
    }
}
