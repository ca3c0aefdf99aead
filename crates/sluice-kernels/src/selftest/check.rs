//! One comparison, and what it may be off by.
//!
//! The rule: on f32 factors an op has the tolerance of its CPU test, in units of `max(1, |wanted|)`. Where a device rounds the factors of
//! a product, the naive twin of the rounded factors is off as well; the op may be off by twice that (three times for gradients) on top.
//! A result in bf16 has 8 bits, so its last rounding is at most one part in 2^9; it may be off by twice that.

use half::bf16;
use sluice_tensor::cuda::Precision;
use sluice_tensor::{DType, Device, Tensor};

/// What one output of one case was off by.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Name of the op.
    pub op: &'static str,
    /// Sizes and options.
    pub case: String,
    /// Which of its outputs.
    pub output: &'static str,
    /// Largest difference from the twin in units of `max(1, |wanted|)`; infinite for NaN.
    pub error: f64,
    /// Largest that passes.
    pub allowed: f64,
}

impl Outcome {
    /// Whether the output is right.
    pub fn passes(&self) -> bool {
        self.error <= self.allowed
    }
}

/// Runs the cases of an op on a device and reports.
pub struct Check<'a> {
    device: &'a Device,
    report: &'a mut dyn FnMut(Outcome),
    /// Text that the cases to run have in their names.
    only: Option<&'a str>,
    op: &'static str,
    case: String,
}

impl<'a> Check<'a> {
    pub(super) fn new(device: &'a Device, only: Option<&'a str>, report: &'a mut dyn FnMut(Outcome)) -> Self {
        Self { device, report, only, op: "", case: String::new() }
    }

    /// Begin a case, unless it is one that nobody asked for.
    #[must_use]
    pub fn case(&mut self, op: &'static str, case: impl Into<String>) -> bool {
        self.op = op;
        self.case = case.into();
        self.only.is_none_or(|text| self.case.contains(text))
    }

    /// Where the cases run.
    pub fn device(&self) -> &Device {
        self.device
    }

    /// A tensor on the device.
    pub fn put(&self, x: &Tensor) -> Tensor {
        x.to(self.device)
    }

    /// Compare an output with what the twin says.
    pub fn compare(&mut self, output: &'static str, got: &Tensor, want: &[f64], allowed: f64) {
        let got = got.to(&Device::Cpu).to_dtype(DType::F32);
        self.compare_slice(output, got.f32(), want, allowed);
    }

    /// The same for numbers that are on the host already.
    pub fn compare_slice(&mut self, output: &'static str, got: &[f32], want: &[f64], allowed: f64) {
        let error = if got.len() == want.len() { error(got.iter().map(|&x| x as f64), want) } else { f64::INFINITY };
        (self.report)(Outcome { op: self.op, case: self.case.clone(), output, error, allowed });
    }

    /// Report something that is right or wrong.
    pub fn require(&mut self, output: &'static str, holds: bool) {
        let error = if holds { 0.0 } else { f64::INFINITY };
        (self.report)(Outcome { op: self.op, case: self.case.clone(), output, error, allowed: 0.0 });
    }

    /// Whether the device rounds the factors of products.
    pub fn rounds_factors(&self) -> bool {
        self.device.gpu().is_some_and(|gpu| gpu.precision() != Precision::F32)
    }

    /// Formats in which an op may be given its activations here.
    pub fn activations(&self) -> Vec<DType> {
        let given = self.device.gpu().map_or(DType::F32, |gpu| gpu.precision().activations());
        if given == DType::F32 { vec![DType::F32] } else { vec![DType::F32, given] }
    }

    /// `x` as an activation of that format: what the twin is to be given, and the tensor on the device.
    pub fn put_as(&self, x: &Tensor, format: DType) -> (Tensor, Tensor) {
        let rounded = x.to_dtype(format);
        (rounded.to_dtype(DType::F32), self.put(&rounded))
    }

    /// What the last rounding of a result of that format may be off by.
    pub fn rounding(&self, format: DType) -> f64 {
        if format == DType::Bf16 { 1.0 / 256.0 } else { 0.0 }
    }

    /// A factor of a product as the device sees it.
    pub fn factor(&self, x: &Tensor) -> Tensor {
        let precision = self.device.gpu().map_or(Precision::F32, |gpu| gpu.precision());
        let round = |x: f32| match precision {
            Precision::F32 => x,
            Precision::Bf16 => bf16::from_f32(x).to_f32(),
            // Matrix units read ten bits after the leading one and ignore the rest.
            Precision::Tf32 => f32::from_bits(x.to_bits() & !0x1fff),
        };
        match x.dtype() {
            DType::Bf16 => x.clone(),
            DType::F32 => Tensor::from_vec(x.f32().iter().map(|&x| round(x)).collect(), x.shape()),
        }
    }

    /// The rule for products: `exact` on f32 factors, and `times` what the twin of the rounded factors is off by.
    pub fn allowed(&self, exact: f64, want: &[f64], want_of_rounded: &[f64], times: f64) -> f64 {
        let extra = if self.rounds_factors() { times * error(want_of_rounded.iter().copied(), want) } else { 0.0 };
        exact + extra
    }
}

fn error(got: impl Iterator<Item = f64>, want: &[f64]) -> f64 {
    let off = |(got, &want): (f64, &f64)| if got == want { 0.0 } else { (got - want).abs() / want.abs().max(1.0) };
    got.zip(want).map(off).fold(0.0, |m, e| if e.is_nan() { f64::INFINITY } else { m.max(e) })
}
