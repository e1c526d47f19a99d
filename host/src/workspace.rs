//! Memory of the device for partial results.

use std::fmt;
use std::sync::Arc;

use packinfer_abi::Scheduler;

use crate::EngineError;
use crate::context::Shared;
use crate::device_plan::{DevicePlan, Layout};
use crate::memory::DeviceBuffer;
use crate::stream::Stream;
use crate::tensor_maps::{KvTensors, QueryTensor, TensorMaps};

/// What the parts of a workspace are aligned to, in bytes.
const ALIGNMENT: u64 = 256;

/// Device memory for what a run needs besides its plan and tensors: partial results, and for `sm_90a` kernels the tensor maps of each Q, K
/// and V that it has met. It grows when a plan needs more, or with the first run of a layer, which waits for the device.
///
/// Runs that use the same workspace come one after the other, so streams that are to run concurrently need one each.
pub struct Workspace {
    bytes: DeviceBuffer<u8>,
    maps: TensorMaps,
    /// The stream of the last run.
    used_on: Option<Stream>,
    shared: Arc<Shared>,
}

impl Workspace {
    pub(crate) fn new(shared: &Arc<Shared>) -> Result<Self, EngineError> {
        let bytes = DeviceBuffer::zeroed(shared, ALIGNMENT as usize, "a workspace")?;
        Ok(Self { bytes, maps: TensorMaps::default(), used_on: None, shared: shared.clone() })
    }

    /// Grows now if the plan needs more, so that running it allocates nothing.
    ///
    /// # Errors
    ///
    /// Not enough device memory.
    pub fn reserve(&mut self, plan: &DevicePlan) -> Result<(), EngineError> {
        let needed = Parts::new(&plan.layout).num_bytes;
        if needed > self.bytes.len() as u64 {
            self.bytes = DeviceBuffer::zeroed(&self.shared, needed as usize, "partial results")?;
        }
        Ok(())
    }

    /// The parts for a run of the plan, after earlier runs.
    pub(crate) fn parts(&mut self, plan: &DevicePlan, stream: &Stream) -> Result<Parts, EngineError> {
        let Parts { scheduler, partial_o, partial_lse, num_bytes } = Parts::new(&plan.layout);
        if num_bytes > self.bytes.len() as u64 {
            stream.check_not_captured("growing a workspace")?;
            self.reserve(plan)?;
        }
        if let Some(other) = self.used_on.as_ref().filter(|&other| other != stream) {
            stream.wait_for(other)?;
            self.used_on = None;
        }
        self.used_on.get_or_insert_with(|| stream.clone());
        let base = self.bytes.address();
        Ok(Parts { scheduler: base + scheduler, partial_o: base + partial_o, partial_lse: base + partial_lse, num_bytes })
    }

    /// Address of the tensor maps of K and V, for a run on the stream that [`Self::parts`] was called with.
    pub(crate) fn kv_maps(&mut self, stream: &Stream, tensors: KvTensors) -> Result<u64, EngineError> {
        self.maps.kv(&self.shared, stream, tensors)
    }

    /// As [`Self::kv_maps`], of Q.
    pub(crate) fn q_maps(&mut self, stream: &Stream, tensor: QueryTensor) -> Result<u64, EngineError> {
        self.maps.queries(&self.shared, stream, tensor)
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workspace").field("bytes", &self.bytes).field("used_on", &self.used_on).finish()
    }
}

/// Where the parts of a workspace lie.
pub(crate) struct Parts {
    /// A [`Scheduler`], which is zero between runs.
    pub scheduler: u64,
    pub partial_o: u64,
    pub partial_lse: u64,
    /// Bytes of all parts.
    num_bytes: u64,
}

impl Parts {
    fn new(layout: &Layout) -> Self {
        let partials = u64::from(layout.heads.num_groups) * u64::from(layout.num_partial_rows);
        let lse_bytes = partials * size_of::<f32>() as u64;
        let partial_o = (size_of::<Scheduler>() as u64).next_multiple_of(ALIGNMENT);
        let partial_lse = (partial_o + lse_bytes * u64::from(layout.shape.head_dim())).next_multiple_of(ALIGNMENT);
        Self { scheduler: 0, partial_o, partial_lse, num_bytes: partial_lse + lse_bytes }
    }
}
