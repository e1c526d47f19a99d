//! Streams: queues of work for the device.

use std::ffi::c_void;
use std::fmt;
use std::ptr;
use std::sync::Arc;

use cust::sys::{self, CUevent, CUevent_flags, CUresult, CUstream, CUstream_flags, CUstreamCaptureStatus};

use crate::EngineError;
use crate::context::Shared;
use crate::error::Doing;

/// A queue of work for the device, done in order. Clones are the same queue.
#[derive(Clone)]
pub struct Stream {
    inner: Arc<Inner>,
}

struct Inner {
    raw: CUstream,
    is_owned: bool,
    /// For other streams to wait for this one.
    event: Event,
    shared: Arc<Shared>,
}

// SAFETY: the driver's functions may be called with a stream from any thread, and from several at a time.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Stream {
    pub(crate) fn new(shared: &Arc<Shared>) -> Result<Self, EngineError> {
        let event = Event::untimed(shared)?;
        let mut raw = ptr::null_mut();
        // SAFETY: the argument is a place for the stream. Such streams do not wait for the default stream, nor it for them.
        unsafe { sys::cuStreamCreate(&mut raw, CUstream_flags::CU_STREAM_NON_BLOCKING as u32) }.doing("making a stream")?;
        Ok(Self { inner: Arc::new(Inner { raw, is_owned: true, event, shared: shared.clone() }) })
    }

    /// # Safety
    ///
    /// As [`crate::Engine::foreign_stream`].
    pub(crate) unsafe fn foreign(shared: &Arc<Shared>, raw: CUstream) -> Result<Self, EngineError> {
        let event = Event::untimed(shared)?;
        Ok(Self { inner: Arc::new(Inner { raw, is_owned: false, event, shared: shared.clone() }) })
    }

    /// Waits until the device has done all work of the stream.
    ///
    /// # Errors
    ///
    /// That of the work.
    pub fn synchronize(&self) -> Result<(), EngineError> {
        self.inner.shared.enter()?;
        // SAFETY: the stream is alive.
        unsafe { sys::cuStreamSynchronize(self.as_raw()) }.doing("waiting for a stream")
    }

    /// Has what is given to this stream from now on wait for what was given to `other` until now.
    ///
    /// # Errors
    ///
    /// A stream that is being captured into a graph, which the other is not part of; or what the driver reports.
    pub fn wait_for(&self, other: &Stream) -> Result<(), EngineError> {
        // Within a capture, streams may wait for each other.
        if !other.is_captured()? {
            self.check_not_captured("waiting for another stream")?;
        }
        // Another thread may record the event again in between: it then stands for more work, with the same in it.
        other.inner.event.record(other)?;
        // SAFETY: both are alive.
        unsafe { sys::cuStreamWaitEvent(self.as_raw(), other.inner.event.raw, 0) }.doing("having a stream wait for another")
    }

    /// Whether what is given to the stream now is captured into a graph.
    fn is_captured(&self) -> Result<bool, EngineError> {
        let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream is alive, and the argument is a place for the status.
        unsafe { sys::cuStreamIsCapturing(self.as_raw(), &mut status) }.doing("asking whether a stream is captured")?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// An error if the stream is being captured, for something that a graph must not hold.
    pub(crate) fn check_not_captured(&self, doing: &'static str) -> Result<(), EngineError> {
        if self.is_captured()? { Err(EngineError::Captured { doing }) } else { Ok(()) }
    }

    /// The driver's handle, a `CUstream`.
    pub fn as_raw(&self) -> CUstream {
        self.inner.raw
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.inner.shared
    }
}

/// Two are equal if they are the same queue.
impl PartialEq for Stream {
    fn eq(&self, other: &Self) -> bool {
        self.as_raw() == other.as_raw() && self.shared().is(other.shared())
    }
}

impl Eq for Stream {}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stream").field(&self.as_raw().cast::<c_void>()).finish()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.is_owned && self.shared.enter().is_ok() {
            // SAFETY: nobody else has the stream. The driver keeps what its work needs until that is done.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// A mark in a stream.
pub(crate) struct Event {
    raw: CUevent,
    shared: Arc<Shared>,
}

// SAFETY: the driver's functions may be called with an event from any thread, and from several at a time.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event that knows when it happened.
    pub fn timed(shared: &Arc<Shared>) -> Result<Self, EngineError> {
        Self::new(shared, CUevent_flags::CU_EVENT_DEFAULT)
    }

    /// An event that is only waited for.
    pub fn untimed(shared: &Arc<Shared>) -> Result<Self, EngineError> {
        Self::new(shared, CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    fn new(shared: &Arc<Shared>, flags: CUevent_flags) -> Result<Self, EngineError> {
        shared.enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the argument is a place for the event.
        unsafe { sys::cuEventCreate(&mut raw, flags as u32) }.doing("making an event")?;
        Ok(Self { raw, shared: shared.clone() })
    }

    /// Marks what was given to the stream until now.
    pub fn record(&self, stream: &Stream) -> Result<(), EngineError> {
        self.shared.enter()?;
        // SAFETY: both are alive.
        unsafe { sys::cuEventRecord(self.raw, stream.as_raw()) }.doing("recording an event")
    }

    /// Whether the device has done what was marked last; so it has if that was nothing.
    pub fn has_happened(&self) -> Result<bool, EngineError> {
        self.shared.enter()?;
        // SAFETY: the event is alive.
        match unsafe { sys::cuEventQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            status => status.doing("asking whether an event has happened").map(|()| true),
        }
    }

    /// Waits until the device has done what was marked last, if anything.
    pub fn synchronize(&self) -> Result<(), EngineError> {
        self.shared.enter()?;
        // SAFETY: the event is alive.
        unsafe { sys::cuEventSynchronize(self.raw) }.doing("waiting for an event")
    }

    /// Milliseconds from `start`. Both are timed, and have happened.
    pub fn milliseconds_since(&self, start: &Event) -> Result<f32, EngineError> {
        let mut milliseconds = 0.0;
        // SAFETY: both are alive, and the argument is a place for the time.
        unsafe { sys::cuEventElapsedTime(&mut milliseconds, start.raw, self.raw) }.doing("reading the time between events")?;
        Ok(milliseconds)
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Event").field(&self.raw.cast::<c_void>()).finish()
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.shared.enter().is_ok() {
            // SAFETY: nobody else has the event. The driver keeps it for streams that still wait for it.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}
