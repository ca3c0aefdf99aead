//! Normal equations of a ridge regression on normalised rows, over any number of documents: how a gate is fitted in closed form.
//!
//! A row is `r_i = (x_i / sqrt(mean(x_i^2) + eps), 1)`; what is kept are the sums over all rows of `r r^T`, `r y^T` and `y^2`, in f64.

pub(crate) mod cases;
mod cpu;
mod cuda;
pub mod naive;
#[cfg(test)]
mod tests;

use sluice_tensor::cuda::{Buffer, or_raise};
use sluice_tensor::{DType, Device, Tensor};

/// The sums as plain numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Sums {
    /// `[M + 1, M + 1]`; the last row and column belong to the intercept.
    pub xx: Vec<f64>,
    /// `[M + 1, G]`.
    pub xy: Vec<f64>,
    /// `[G]` sum of squares of the label.
    pub yy: Vec<f64>,
}

impl Sums {
    /// No rows of `m` inputs and `g` labels.
    pub fn zeros(m: usize, g: usize) -> Self {
        Self { xx: vec![0.0; (m + 1) * (m + 1)], xy: vec![0.0; (m + 1) * g], yy: vec![0.0; g] }
    }

    /// Number of rows seen.
    pub fn samples(&self) -> f64 {
        self.xx.last().copied().unwrap_or(0.0)
    }
}

/// Sums that grow where the rows are: they move to the device of what is added, and come to the host when asked for.
pub struct RidgeSums {
    m: usize,
    g: usize,
    place: Place,
}

enum Place {
    Host(Sums),
    /// `[M + 1 + G, M + 1 + G]` of the rows and their labels side by side, f64.
    Gpu(Buffer),
}

impl RidgeSums {
    /// No rows of `m` inputs and `g` labels.
    pub fn new(m: usize, g: usize) -> Self {
        Self { m, g, place: Place::Host(Sums::zeros(m, g)) }
    }

    /// Continue from `sums`; `false`, and nothing changed, when they have other sizes.
    pub fn set(&mut self, sums: Sums) -> bool {
        let own = Sums::zeros(self.m, self.g);
        let fits = (sums.xx.len(), sums.xy.len(), sums.yy.len()) == (own.xx.len(), own.xy.len(), own.yy.len());
        if fits {
            self.place = Place::Host(sums);
        }
        fits
    }

    /// Add the rows `positions` of `x [1, T, M]` (f32 or bf16) with labels `y [n, G]`, both on one device.
    #[track_caller]
    pub fn add(&mut self, x: &Tensor, eps: f32, positions: &[u32], y: &Tensor) {
        let [b, t, m] = x.dims();
        assert!(
            b == 1 && m == self.m && y.shape() == [positions.len(), self.g] && positions.iter().all(|&p| (p as usize) < t),
            "ridge sums of {} inputs and {} labels: x {:?}, {} positions, y {:?}",
            self.m,
            self.g,
            x.shape(),
            positions.len(),
            y.shape()
        );
        let x = &x.to_dtype(DType::F32);
        let Some(gpu) = x.gpu() else {
            if let Place::Gpu(_) = self.place {
                self.place = Place::Host(self.sums());
            }
            if let Place::Host(sums) = &mut self.place {
                cpu::add(sums, x, eps, positions, y);
            }
            return;
        };
        if let Place::Host(sums) = &self.place {
            self.place = Place::Gpu(or_raise(gpu.upload_slice(&cuda::side_by_side(sums, m, self.g))));
        }
        let Place::Gpu(sums) = &self.place else { unreachable!("just moved there") };
        assert!(Device::Cuda(sums.gpu().clone()) == x.device(), "ridge sums on {:?} and rows on {gpu:?}", sums.gpu());
        cuda::add(gpu, sums, x, eps, positions, y);
    }

    /// The sums so far; from a GPU, the host waits for them.
    pub fn sums(&self) -> Sums {
        match &self.place {
            Place::Host(sums) => sums.clone(),
            Place::Gpu(sums) => cuda::taken_apart(&or_raise(sums.gpu().download_slice(sums)), self.m, self.g),
        }
    }
}
