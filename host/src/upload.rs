//! What the host writes again and again, and kernels on any streams read.

use std::sync::{Arc, Mutex, PoisonError};

use cust::sys;

use crate::EngineError;
use crate::context::Shared;
use crate::error::Doing;
use crate::memory::{DeviceBuffer, PinnedBuffer};
use crate::stream::{Event, Stream};

/// The least that is allocated, in bytes, so that short lists and the plans of small batches fit each other's memory.
const LEAST_BYTES: usize = 64 << 10;

/// Bytes on the device. They are copied there in order with a stream, and the host does not wait; other streams that read them
/// wait by themselves.
pub(crate) struct Upload {
    bytes: DeviceBuffer<u8>,
    /// Used in turn, so that the host may write one while the device copies the other.
    staging: [Staging; 2],
    /// The stream that they were copied on.
    copied_on: Stream,
    /// Other streams that have read them since.
    read_on: Mutex<Vec<Stream>>,
    /// What they are, for errors.
    what: &'static str,
    shared: Arc<Shared>,
}

impl Upload {
    /// Room for `num_bytes` bytes and somewhat more, of what is named in the error if there is none. They are first copied on
    /// `stream`.
    pub fn new(what: &'static str, num_bytes: usize, stream: &Stream) -> Result<Self, EngineError> {
        let shared = stream.shared().clone();
        let (bytes, staging) = allocate(&shared, what, num_bytes)?;
        Ok(Self { bytes, staging, copied_on: stream.clone(), read_on: Mutex::default(), what, shared })
    }

    /// Replaces the bytes by some parts, each with its offset. What is there already is no longer needed when those streams that
    /// have read it get here. Allocates only if there is too little room; the host waits only if the copy before the last one is
    /// not done.
    ///
    /// The stream is not captured into a graph, which would copy these bytes again.
    pub fn replace(&mut self, parts: &[(usize, &[u8])], stream: &Stream) -> Result<(), EngineError> {
        self.shared.enter()?;
        let num_bytes = parts.iter().map(|(offset, part)| offset + part.len()).max().unwrap_or(0);
        if num_bytes > self.bytes.len() {
            (self.bytes, self.staging) = allocate(&self.shared, self.what, num_bytes)?;
        }
        let read_on = self.read_on.get_mut().unwrap_or_else(PoisonError::into_inner);
        for other in read_on.iter().chain([&self.copied_on]).filter(|&other| other != stream) {
            stream.wait_for(other)?;
        }
        read_on.clear();
        self.copied_on = stream.clone();
        if num_bytes == 0 {
            return Ok(());
        }
        self.staging.swap(0, 1);
        let [Staging { bytes: staging, copied }, _] = &mut self.staging;
        copied.synchronize()?;
        for &(offset, part) in parts {
            staging.as_mut_slice()[offset..][..part.len()].copy_from_slice(part);
        }
        let (to, from) = (self.bytes.address(), staging.as_ptr());
        // SAFETY: both buffers have so many bytes. Neither is freed or, as the next copy from it waits for `copied`, written by
        // the host before the copy is done.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), num_bytes, stream.as_raw()) }
            .doing("copying a plan or a list to the device")?;
        copied.record(stream)
    }

    /// Has a stream that is to read the bytes wait for their copy, once, and remembers it.
    pub fn read_on(&self, stream: &Stream) -> Result<(), EngineError> {
        if *stream == self.copied_on {
            return Ok(());
        }
        let mut read_on = self.read_on.lock().unwrap_or_else(PoisonError::into_inner);
        if !read_on.contains(stream) {
            stream.wait_for(&self.copied_on)?;
            read_on.push(stream.clone());
        }
        Ok(())
    }

    /// Address on the device of the byte at `offset`.
    pub fn address(&self, offset: usize) -> u64 {
        self.bytes.address() + offset as u64
    }

    pub fn shared(&self) -> &Shared {
        &self.shared
    }
}

/// Memory of the host that the bytes are copied from.
struct Staging {
    bytes: PinnedBuffer,
    /// Happens when the copy is done.
    copied: Event,
}

impl Staging {
    fn new(shared: &Arc<Shared>, num_bytes: usize) -> Result<Self, EngineError> {
        Ok(Self { bytes: PinnedBuffer::zeroed(shared, num_bytes)?, copied: Event::untimed(shared)? })
    }
}

/// Memory for so many bytes, and for somewhat more, on both sides.
fn allocate(shared: &Arc<Shared>, what: &'static str, num_bytes: usize) -> Result<(DeviceBuffer<u8>, [Staging; 2]), EngineError> {
    let capacity = num_bytes.next_power_of_two().max(LEAST_BYTES);
    let staging = [Staging::new(shared, capacity)?, Staging::new(shared, capacity)?];
    Ok((DeviceBuffer::zeroed(shared, capacity, what)?, staging))
}
