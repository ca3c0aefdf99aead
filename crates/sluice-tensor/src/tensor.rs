//! A contiguous, row-major, reference-counted tensor. Cloning and reshaping share the storage;
//! [`Tensor::f32_mut`] copies it first when somebody else still looks at it.

use std::sync::{Arc, OnceLock};

use half::bf16;

use crate::cuda::{self, Buffer, Gpu, or_raise};
use crate::memory;

/// Where a tensor lives and is computed with: a cheap handle.
#[derive(Clone, Debug)]
pub enum Device {
    /// Main memory.
    Cpu,
    /// An NVIDIA GPU.
    Cuda(Arc<Gpu>),
}

impl Device {
    /// The GPU, if it is one.
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        match self {
            Self::Cpu => None,
            Self::Cuda(gpu) => Some(gpu),
        }
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Cpu, Self::Cpu) => true,
            (Self::Cuda(a), Self::Cuda(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// Number format of the stored elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16: the upper half of a single.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

enum Elements {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    Cuda(Buffer, DType),
}

impl Elements {
    fn bytes(&self) -> usize {
        match self {
            Self::F32(v) => v.len() * 4,
            Self::Bf16(v) => v.len() * 2,
            Self::Cuda(buffer, _) => buffer.bytes(),
        }
    }

    /// Bytes that this type counts; a buffer counts its own.
    fn counted_bytes(&self) -> usize {
        if matches!(self, Self::Cuda(..)) { 0 } else { self.bytes() }
    }
}

impl Clone for Elements {
    fn clone(&self) -> Self {
        match self {
            Self::F32(v) => Self::F32(v.clone()),
            Self::Bf16(v) => Self::Bf16(v.clone()),
            Self::Cuda(buffer, dtype) => {
                let gpu = buffer.gpu();
                let copy = or_raise(gpu.alloc(buffer.bytes()));
                or_raise(gpu.copy(buffer, 0, &copy, 0, buffer.bytes()));
                Self::Cuda(copy, *dtype)
            }
        }
    }
}

/// Counted storage, and what it is in bf16, if somebody asked ([`Tensor::rounded`]).
struct Storage(Elements, OnceLock<Tensor>);

impl Storage {
    fn new(elements: Elements) -> Self {
        memory::allocated(elements.counted_bytes());
        Self(elements, OnceLock::new())
    }
}

impl Clone for Storage {
    fn clone(&self) -> Self {
        Self::new(self.0.clone())
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        memory::freed(self.0.counted_bytes());
    }
}

/// Contiguous row-major tensor; the layout of activations is `[B, T, H, D]` everywhere.
#[derive(Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    storage: Arc<Storage>,
}

impl Tensor {
    /// Take `data` as a tensor of `shape`; panics when the sizes disagree.
    #[track_caller]
    pub fn from_vec(data: Vec<f32>, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        assert_eq!(data.len(), shape.iter().product::<usize>(), "{} elements cannot have shape {shape:?}", data.len());
        Self { shape, storage: Arc::new(Storage::new(Elements::F32(data))) }
    }

    /// The same for bf16 elements.
    #[track_caller]
    pub fn from_bf16_vec(data: Vec<bf16>, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        assert_eq!(data.len(), shape.iter().product::<usize>(), "{} elements cannot have shape {shape:?}", data.len());
        Self { shape, storage: Arc::new(Storage::new(Elements::Bf16(data))) }
    }

    /// f32 zeros.
    pub fn zeros(shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        Self::from_vec(vec![0.0; shape.iter().product()], shape)
    }

    /// f32 copies of `value`.
    pub fn full(value: f32, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        Self::from_vec(vec![value; shape.iter().product()], shape)
    }

    /// f32 zeros on a device.
    pub fn zeros_on(device: &Device, shape: impl Into<Vec<usize>>) -> Self {
        let Device::Cuda(gpu) = device else { return Self::zeros(shape) };
        Self::zeros_on_gpu(gpu, shape, DType::F32)
    }

    /// Zeros of a format on a GPU.
    pub fn zeros_on_gpu(gpu: &Arc<Gpu>, shape: impl Into<Vec<usize>>, dtype: DType) -> Self {
        let zeros = Self::empty_on(gpu, shape, dtype);
        if let Elements::Cuda(buffer, _) = &zeros.storage.0 {
            or_raise(gpu.fill_bytes(buffer, 0));
        }
        zeros
    }

    /// A tensor on a GPU whose elements are not defined yet: the output of a kernel that writes all of it.
    pub fn empty_on(gpu: &Arc<Gpu>, shape: impl Into<Vec<usize>>, dtype: DType) -> Self {
        let shape = shape.into();
        let buffer = or_raise(gpu.alloc(shape.iter().product::<usize>() * dtype.size()));
        Self { shape, storage: Arc::new(Storage::new(Elements::Cuda(buffer, dtype))) }
    }

    /// A tensor with one element and no axes.
    pub fn scalar(value: f32) -> Self {
        Self::from_vec(vec![value], [])
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The shape as an array; panics unless there are exactly `N` axes.
    #[track_caller]
    pub fn dims<const N: usize>(&self) -> [usize; N] {
        self.shape.as_slice().try_into().unwrap_or_else(|_| panic!("expected {N} axes, found shape {:?}", self.shape))
    }

    /// Size of the last axis; 1 for a scalar.
    pub fn last_dim(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of rows when everything but the last axis is flattened.
    pub fn n_rows(&self) -> usize {
        self.len().checked_div(self.last_dim()).unwrap_or(0)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number format.
    pub fn dtype(&self) -> DType {
        match self.storage.0 {
            Elements::F32(_) => DType::F32,
            Elements::Bf16(_) => DType::Bf16,
            Elements::Cuda(_, dtype) => dtype,
        }
    }

    /// Where the elements are.
    pub fn device(&self) -> Device {
        self.gpu().map_or(Device::Cpu, |gpu| Device::Cuda(Arc::clone(gpu)))
    }

    /// The GPU that holds the elements, if one does.
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        match &self.storage.0 {
            Elements::Cuda(buffer, _) => Some(buffer.gpu()),
            _ => None,
        }
    }

    /// The same elements on a device, sharing the storage if they are there already. From a GPU to main memory the host waits.
    pub fn to(&self, device: &Device) -> Self {
        if self.device() == *device {
            return self.clone();
        }
        let shape = self.shape.clone();
        match (&self.storage.0, device) {
            (Elements::Cuda(buffer, dtype), Device::Cpu) => match dtype {
                DType::F32 => Self::from_vec(or_raise(buffer.gpu().download_slice(buffer)), shape),
                DType::Bf16 => Self::from_bf16_vec(or_raise(buffer.gpu().download_slice(buffer)), shape),
            },
            (Elements::Cuda(..), Device::Cuda(_)) => self.to(&Device::Cpu).to(device),
            (Elements::F32(v), Device::Cuda(gpu)) => Self::uploaded(gpu, bytemuck::cast_slice(v), shape, DType::F32),
            (Elements::Bf16(v), Device::Cuda(gpu)) => Self::uploaded(gpu, bytemuck::cast_slice(v), shape, DType::Bf16),
            (_, Device::Cpu) => unreachable!("already there"),
        }
    }

    fn uploaded(gpu: &Arc<Gpu>, bytes: &[u8], shape: Vec<usize>, dtype: DType) -> Self {
        let buffer = or_raise(gpu.upload_slice(bytes));
        Self { shape, storage: Arc::new(Storage::new(Elements::Cuda(buffer, dtype))) }
    }

    /// Address of the elements on their GPU, for the arguments of a kernel that reads them; panics for main memory.
    #[track_caller]
    pub fn address(&self) -> u64 {
        match &self.storage.0 {
            Elements::Cuda(buffer, _) => buffer.address(),
            _ => panic!("expected a tensor on a GPU, found one of shape {:?} in main memory", self.shape),
        }
    }

    /// The same for a kernel that writes them; copies the storage first if it is shared.
    #[track_caller]
    pub fn address_mut(&mut self) -> u64 {
        let storage = Arc::make_mut(&mut self.storage);
        storage.1.take();
        match &storage.0 {
            Elements::Cuda(buffer, _) => buffer.address(),
            _ => panic!("expected a tensor on a GPU, found one of shape {:?} in main memory", self.shape),
        }
    }

    /// Bytes of the elements.
    pub fn bytes(&self) -> usize {
        self.storage.0.bytes()
    }

    /// Elements of an f32 tensor; panics for another format.
    #[track_caller]
    pub fn f32(&self) -> &[f32] {
        match &self.storage.0 {
            Elements::F32(v) => v,
            _ => self.unexpected("an f32 tensor in main memory"),
        }
    }

    /// Elements of a bf16 tensor; panics for another format.
    #[track_caller]
    pub fn bf16(&self) -> &[bf16] {
        match &self.storage.0 {
            Elements::Bf16(v) => v,
            _ => self.unexpected("a bf16 tensor in main memory"),
        }
    }

    /// Elements of an f32 tensor for writing; copies the storage first if it is shared.
    #[track_caller]
    pub fn f32_mut(&mut self) -> &mut [f32] {
        if !matches!(self.storage.0, Elements::F32(_)) {
            self.unexpected("an f32 tensor in main memory");
        }
        let storage = Arc::make_mut(&mut self.storage);
        storage.1.take();
        match &mut storage.0 {
            Elements::F32(v) => v,
            _ => unreachable!("checked above"),
        }
    }

    #[track_caller]
    fn unexpected(&self, expected: &str) -> ! {
        panic!("expected {expected}, found {self:?}")
    }

    /// The elements of an f32 tensor as a vector, without a copy when nobody else looks at them.
    #[track_caller]
    pub fn into_vec(mut self) -> Vec<f32> {
        self.f32_mut();
        let mut storage = Arc::into_inner(self.storage).expect("f32_mut made the storage unique");
        memory::freed(storage.0.bytes());
        match std::mem::replace(&mut storage.0, Elements::F32(Vec::new())) {
            Elements::F32(v) => v,
            _ => unreachable!("checked by f32_mut"),
        }
    }

    /// The one element of an f32 tensor; from a GPU, the host waits for it.
    #[track_caller]
    pub fn item(&self) -> f32 {
        assert_eq!(self.len(), 1, "item() of a tensor of shape {:?}", self.shape);
        self.to(&Device::Cpu).f32()[0]
    }

    /// The same elements in another shape, sharing the storage; panics when the sizes disagree.
    #[track_caller]
    pub fn reshape(&self, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        assert_eq!(self.len(), shape.iter().product::<usize>(), "reshape of {:?} to {shape:?}", self.shape);
        Self { shape, storage: Arc::clone(&self.storage) }
    }

    /// A copy in the given format; shares the storage when it already has it.
    pub fn to_dtype(&self, dtype: DType) -> Self {
        if self.dtype() == dtype {
            return self.clone();
        }
        if let (Some(rounded), DType::Bf16) = (self.storage.1.get(), dtype) {
            return rounded.reshape(self.shape.clone());
        }
        match (&self.storage.0, dtype) {
            (Elements::Cuda(..), _) => cuda::convert(self, 0, self.len(), dtype).reshape(self.shape.clone()),
            (Elements::F32(v), DType::Bf16) => Self::from_bf16_vec(v.iter().map(|&x| bf16::from_f32(x)).collect(), self.shape.clone()),
            (Elements::Bf16(v), DType::F32) => Self::from_vec(v.iter().map(|x| x.to_f32()).collect(), self.shape.clone()),
            (Elements::F32(_), DType::F32) | (Elements::Bf16(_), DType::Bf16) => unreachable!("already there"),
        }
    }

    /// The elements in bf16, kept beside them until they are written: a weight is converted once a step, however often it is a factor.
    pub fn rounded(&self) -> Self {
        if self.dtype() == DType::Bf16 {
            return self.clone();
        }
        self.storage.1.get_or_init(|| self.to_dtype(DType::Bf16)).reshape(self.shape.clone())
    }

    /// Say what the elements are in bf16, for a kernel that has written both; [`Self::to_dtype`] and [`Self::rounded`] then convert nothing.
    #[track_caller]
    pub fn keep_rounded(&self, rounded: Self) {
        assert!(rounded.dtype() == DType::Bf16 && rounded.len() == self.len(), "{rounded:?} is not {self:?} in bf16");
        // There is at most one, and the kernel's is as good as one that is there.
        let _ = self.storage.1.set(rounded);
    }

    /// Whether both tensors are the same piece of memory.
    pub fn shares_storage_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.storage, &other.storage)
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({:?}, {:?}", self.dtype(), self.shape)?;
        match self.gpu() {
            Some(gpu) => write!(f, ", {gpu:?})"),
            None => write!(f, ")"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_to_a_shared_tensor_leaves_the_other_alone() {
        let a = Tensor::from_vec(vec![1.0, 2.0], [2]);
        let mut b = a.reshape([1, 2]);
        assert!(a.shares_storage_with(&b));
        b.f32_mut()[0] = 5.0;
        assert_eq!((a.f32(), b.f32()), (&[1.0, 2.0][..], &[5.0, 2.0][..]));
    }

    #[test]
    fn bf16_round_trip_keeps_eight_bits() {
        let a = Tensor::from_vec(vec![1.0, -3.140625, 0.0], [3]);
        assert_eq!(a.to_dtype(DType::Bf16).bytes(), 6);
        assert_eq!(a.to_dtype(DType::Bf16).to_dtype(DType::F32).f32(), a.f32());
    }

    #[test]
    fn what_is_kept_in_bf16_is_kept_once() {
        let a = Tensor::from_vec(vec![1.0, -3.140625, 0.5], [3]);
        assert!(a.rounded().shares_storage_with(&a.reshape([1, 3]).rounded()));
        assert!(a.to_dtype(DType::Bf16).shares_storage_with(&a.rounded()));
        assert_eq!(a.rounded().to_dtype(DType::F32).f32(), a.f32());
    }

    #[test]
    fn writing_forgets_what_the_elements_were_in_bf16() {
        let mut a = Tensor::from_vec(vec![1.0, 2.0], [2]);
        let before = a.rounded();
        a.f32_mut()[0] = 5.0;
        assert_eq!(a.rounded().to_dtype(DType::F32).f32(), [5.0, 2.0]);
        assert_eq!(before.to_dtype(DType::F32).f32(), [1.0, 2.0]);
    }

    #[test]
    #[should_panic(expected = "reshape of [2, 3] to [4]")]
    fn reshape_refuses_another_size() {
        let _ = Tensor::zeros([2, 3]).reshape([4]);
    }
}
