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
        if self.format == BlockFormat::Bf16 {
            let data = self.read_elements(file, bf16::ZERO, |bytes, out| {
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = bf16::from_le_bytes(*b);
                }
            })?;
            return Ok(Tensor::from_bf16_vec(data, self.shape.clone()));
        }
        let data = self.read_elements(file, 0.0, |bytes, out| dequantise(self.format, bytes, out))?;
        Ok(Tensor::from_vec(data, self.shape.clone()))
    }

    /// Each task reads its own piece of the file and converts it, so no second copy of the tensor exists.
    fn read_elements<T: Copy + Send>(
        &self,
        file: &SizedFile,
        zero: T,
        convert: impl Fn(&[u8], &mut [T]) + Sync,
    ) -> Result<Vec<T>, CheckpointError> {
        let bytes_of = |elements: usize| elements / self.format.block_len() * self.format.block_bytes();
        let piece = |(number, out): (usize, &mut [T])| {
            let mut bytes = vec![0; bytes_of(out.len())];
            file.read_at(self.offset + bytes_of(number * CHUNK) as u64, &mut bytes)?;
            convert(&bytes, out);
            Ok(())
        };
        let mut data = vec![zero; self.shape.iter().product()];
        if data.len() <= CHUNK {
            piece((0, &mut data))?; // Norms and biases are not worth waking another thread.
        } else {
            data.par_chunks_mut(CHUNK).enumerate().try_for_each(piece)?;
        }
        Ok(data)
    }
}
