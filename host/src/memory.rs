//! Memory of the device, and memory of the host that the device reads while the host goes on.

use std::fmt;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use bytemuck::Pod;
use cust::error::CudaError;
use cust::memory::{CopyDestination, DeviceBuffer as Bytes, LockedBuffer};
use cust::sys;

use crate::EngineError;
use crate::context::{Shared, check_not_capturing};
use crate::error::Doing;

/// Elements in device memory, zero at first. It is freed when dropped, after the device has done the work that was given to it.
pub struct DeviceBuffer<T> {
    bytes: ManuallyDrop<Bytes<u8>>,
    len: usize,
    shared: Arc<Shared>,
    elements: PhantomData<T>,
}

impl<T: Pod> DeviceBuffer<T> {
    /// `len` zeros, for what is named in the error if there is no room.
    pub(crate) fn zeroed(shared: &Arc<Shared>, len: usize, what: &'static str) -> Result<Self, EngineError> {
        Self::filled(shared, 0, len, what)
    }

    /// `len` elements, each byte of which is `byte`, for what is named in the error if there is no room.
    pub(crate) fn filled(shared: &Arc<Shared>, byte: u8, len: usize, what: &'static str) -> Result<Self, EngineError> {
        check_not_capturing("allocating device memory")?;
        shared.enter()?;
        let num_bytes = len as u64 * size_of::<T>() as u64;
        // SAFETY: bytes have no invalid values, and nobody reads these before they are set to zero.
        let bytes = match unsafe { Bytes::uninitialized(num_bytes as usize) } {
            Err(CudaError::OutOfMemory) => return Err(EngineError::OutOfMemory { what, bytes: num_bytes, free: free_bytes() }),
            bytes => bytes.doing("allocating device memory")?,
        };
        let buffer = Self { bytes: ManuallyDrop::new(bytes), len, shared: shared.clone(), elements: PhantomData };
        if num_bytes > 0 {
            // SAFETY: the buffer has so many bytes.
            unsafe { sys::cuMemsetD8_v2(buffer.address(), byte, num_bytes as usize) }.doing("filling device memory")?;
            // Streams do not wait for this by themselves.
            shared.synchronize()?;
        }
        Ok(buffer)
    }

    /// `len` elements that are those of `elements`, over and over, for what is named in the error if there is no room; zeros if
    /// there are none.
    pub(crate) fn repeating(shared: &Arc<Shared>, elements: &[T], len: usize, what: &'static str) -> Result<Self, EngineError> {
        let buffer = Self::zeroed(shared, len, what)?;
        let elements = &elements[..elements.len().min(len)];
        if elements.is_empty() {
            return Ok(buffer);
        }
        let num_bytes = size_of_val(elements);
        // SAFETY: both have so many bytes.
        unsafe { sys::cuMemcpyHtoD_v2(buffer.address(), elements.as_ptr().cast(), num_bytes) }.doing("copying to the device")?;
        let (mut copied, all) = (num_bytes, len * size_of::<T>());
        while copied < all {
            let next = copied.min(all - copied);
            // SAFETY: the bytes up to `copied` have values, and the buffer has `next` more.
            unsafe { sys::cuMemcpyDtoD_v2(buffer.address() + copied as u64, buffer.address(), next) }
                .doing("copying device memory")?;
            copied += next;
        }
        // Streams do not wait for this by themselves.
        shared.synchronize()?;
        Ok(buffer)
    }

    /// Copies `elements` to the device, and waits for it.
    ///
    /// # Errors
    ///
    /// Another number of elements than the buffer has, or what the driver reports.
    pub fn upload(&mut self, elements: &[T]) -> Result<(), EngineError> {
        self.check_length(elements)?;
        self.shared.synchronize()?;
        if !elements.is_empty() {
            self.bytes.copy_from(bytemuck::cast_slice(elements)).doing("copying to the device")?;
        }
        self.shared.synchronize()
    }

    /// Waits for all work of the device, and copies the elements from it.
    ///
    /// # Errors
    ///
    /// What the driver reports, be it of that work.
    pub fn download(&self) -> Result<Vec<T>, EngineError> {
        let mut elements = vec![T::zeroed(); self.len];
        self.download_into(&mut elements)?;
        Ok(elements)
    }

    /// Waits for all work of the device, and copies the elements to `elements`.
    ///
    /// # Errors
    ///
    /// Another number of elements than the buffer has, or what the driver reports, be it of that work.
    pub fn download_into(&self, elements: &mut [T]) -> Result<(), EngineError> {
        self.check_length(elements)?;
        self.shared.synchronize()?;
        if !elements.is_empty() {
            self.bytes.copy_to(bytemuck::cast_slice_mut::<T, u8>(elements)).doing("copying from the device")?;
        }
        Ok(())
    }

    fn check_length(&self, elements: &[T]) -> Result<(), EngineError> {
        let (buffer, slice) = (self.len, elements.len());
        if buffer == slice { Ok(()) } else { Err(EngineError::CopyLength { buffer, slice }) }
    }
}

impl<T> DeviceBuffer<T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Where the elements lie on the device; 0 if there are none.
    pub fn address(&self) -> u64 {
        self.bytes.as_device_ptr().as_raw()
    }

    /// The elements, to be read by the device.
    pub fn as_slice(&self) -> DeviceSlice<'_, T> {
        DeviceSlice { address: self.address(), len: self.len, elements: PhantomData }
    }

    /// The elements, to be written by the device.
    pub fn as_mut_slice(&mut self) -> DeviceSliceMut<'_, T> {
        DeviceSliceMut { address: self.address(), len: self.len, elements: PhantomData }
    }
}

impl<T> fmt::Debug for DeviceBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceBuffer").field("address", &self.address()).field("len", &self.len).finish()
    }
}

impl<T> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        self.shared.quiesce();
        // SAFETY: the field is not used again.
        unsafe { ManuallyDrop::drop(&mut self.bytes) };
    }
}

/// Elements in device memory, to be read by the device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSlice<'a, T> {
    pub(crate) address: u64,
    pub(crate) len: usize,
    elements: PhantomData<&'a [T]>,
}

impl<T> DeviceSlice<'_, T> {
    /// `len` elements from `address` on, in memory that somebody else allocated.
    ///
    /// # Safety
    ///
    /// The memory is accessible in the primary context of the engine's device, and stays so until the device has done all work
    /// that reads it.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        Self { address, len, elements: PhantomData }
    }

    /// All but the first `count` elements; none if there are no more.
    pub fn skip(self, count: usize) -> Self {
        let count = count.min(self.len);
        Self { address: self.address + (count * size_of::<T>()) as u64, len: self.len - count, ..self }
    }

    /// The first `count` elements; all if there are no more.
    pub fn first(self, count: usize) -> Self {
        Self { len: count.min(self.len), ..self }
    }
}

/// Elements in device memory, to be written by the device.
#[derive(Debug)]
pub struct DeviceSliceMut<'a, T> {
    pub(crate) address: u64,
    pub(crate) len: usize,
    elements: PhantomData<&'a mut [T]>,
}

impl<T> DeviceSliceMut<'_, T> {
    /// `len` elements from `address` on, in memory that somebody else allocated.
    ///
    /// # Safety
    ///
    /// As [`DeviceSlice::from_raw`], and until then nobody else reads or writes the memory but in an order that streams give.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        Self { address, len, elements: PhantomData }
    }
}

/// Bytes of the host that the device copies while the host goes on. They are freed when dropped, after all work of the device.
pub(crate) struct PinnedBuffer {
    bytes: ManuallyDrop<LockedBuffer<u8>>,
    shared: Arc<Shared>,
}

impl PinnedBuffer {
    pub fn zeroed(shared: &Arc<Shared>, len: usize) -> Result<Self, EngineError> {
        shared.enter()?;
        let bytes = LockedBuffer::new(&0, len).doing("allocating pinned memory")?;
        Ok(Self { bytes: ManuallyDrop::new(bytes), shared: shared.clone() })
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    pub fn as_ptr(&self) -> *const u8 {
        self.bytes.as_ptr()
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        self.shared.quiesce();
        // SAFETY: the field is not used again.
        unsafe { ManuallyDrop::drop(&mut self.bytes) };
    }
}

/// Bytes of device memory that are free now; 0 if the driver does not say.
fn free_bytes() -> u64 {
    let (mut free, mut total) = (0, 0);
    // SAFETY: the arguments are places for the numbers.
    let _ = unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) };
    free as u64
}
