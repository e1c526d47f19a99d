//! Memory of the device for partial results and counters.

use std::fmt;
use std::sync::Arc;

use packinfer_abi::{NOT_STORED, Scheduler};
use packinfer_planner::KvTensors;

use crate::context::Shared;
use crate::device_plan::{DevicePlan, Layout};
use crate::memory::DeviceBuffer;
use crate::stream::Stream;
use crate::tensor_maps::{MappedKv, QueryTensor, TensorMaps};
use crate::{EngineError, KernelFamily};

/// What memory is for that a planner can do without, for errors.
const WIDENED: &str = "K and V of prompts made of FP8 (Planner::with_widening says how much that may take)";
/// What the parts of a workspace are aligned to, in bytes.
const ALIGNMENT: u64 = 256;

/// Device memory for what a run needs besides its plan and tensors: partial results, counters, K and V that a plan has [made of
/// FP8](packinfer_planner::Plan::widening), and for `sm_90a` kernels the tensor maps of each Q, K and V that it has met. It grows
/// when a plan needs more, or with the first run of a layer, which waits for the device. Maps of a tensor at a new address are a
/// small copy: it pays to have Q at the same addresses in every step.
///
/// Runs that use the same workspace come one after the other, so streams that are to run concurrently need one each.
pub struct Workspace {
    /// Partial results, for each family of kernels: those of `sm_90a` have every word [`NOT_STORED`] between runs, whatever plans
    /// have run before.
    partials: [DeviceBuffer<u8>; 2],
    /// Zero between runs.
    counters: DeviceBuffer<u8>,
    /// K that a plan has made of FP8, and V in the other half.
    widened: DeviceBuffer<u8>,
    maps: TensorMaps,
    /// The stream of the last run.
    used_on: Option<Stream>,
    shared: Arc<Shared>,
}

impl Workspace {
    pub(crate) fn new(shared: &Arc<Shared>) -> Result<Self, EngineError> {
        let [ampere, hopper, counters, widened] = [(); 4].map(|()| DeviceBuffer::zeroed(shared, 0, "a workspace"));
        Ok(Self {
            partials: [ampere?, hopper?],
            counters: counters?,
            widened: widened?,
            maps: TensorMaps::default(),
            used_on: None,
            shared: shared.clone(),
        })
    }

    /// Grows now if the plan needs more, so that running it allocates nothing.
    ///
    /// # Errors
    ///
    /// Not enough device memory.
    pub fn reserve(&mut self, plan: &DevicePlan) -> Result<(), EngineError> {
        let Needed { partial_bytes, counter_bytes, widened_bytes, .. } = Needed::by(&plan.layout);
        let family = plan.layout.family;
        if widened_bytes > self.widened.len() as u64 {
            self.widened = DeviceBuffer::zeroed(&self.shared, widened_bytes as usize, WIDENED)?;
        }
        if partial_bytes > self.partials_of(family).len() as u64 {
            // Each byte of the word is the same.
            let [byte, ..] = NOT_STORED.to_ne_bytes();
            let partials = DeviceBuffer::filled(&self.shared, byte, partial_bytes as usize, "partial results")?;
            *self.partials_of(family) = partials;
        }
        if counter_bytes > self.counters.len() as u64 {
            self.counters = DeviceBuffer::zeroed(&self.shared, counter_bytes as usize, "counters")?;
        }
        Ok(())
    }

    /// The parts for a run of the plan, after earlier runs.
    pub(crate) fn parts(&mut self, plan: &DevicePlan, stream: &Stream) -> Result<Parts, EngineError> {
        let Needed { lse_offset, partial_bytes, counter_bytes, widened_bytes } = Needed::by(&plan.layout);
        let family = plan.layout.family;
        if partial_bytes > self.partials_of(family).len() as u64
            || counter_bytes > self.counters.len() as u64
            || widened_bytes > self.widened.len() as u64
        {
            stream.check_not_captured("growing a workspace")?;
            self.reserve(plan)?;
        }
        if let Some(other) = self.used_on.as_ref().filter(|&other| other != stream) {
            stream.wait_for(other)?;
            self.used_on = None;
        }
        self.used_on.get_or_insert_with(|| stream.clone());
        let (partials, counters) = (self.partials_of(family).address(), self.counters.address());
        Ok(Parts {
            partial_o: partials,
            partial_lse: partials + lse_offset,
            scheduler: counters,
            lse_readers: counters + LSE_READERS_OFFSET,
            widened: plan.layout.widened.map(|tensors| self.widened(tensors)),
        })
    }

    /// K and V that a plan makes of FP8: tensors of as many slots as there is room for, so that all plans have the same ones.
    fn widened(&self, KvTensors { shape, layout, .. }: KvTensors) -> MappedKv {
        let bytes = self.widened.len() as u64 / 2;
        let num_slots = bytes / (shape.kv_bytes_per_slot() / 2);
        let address = self.widened.address();
        MappedKv { shape, layout, addresses: [address, address + bytes], num_slots: [num_slots; 2] }
    }

    /// Where kernels of a family put partial results.
    fn partials_of(&mut self, family: KernelFamily) -> &mut DeviceBuffer<u8> {
        &mut self.partials[usize::from(family == KernelFamily::Sm90a)]
    }

    /// Addresses of the tensor maps of K and V of wide tiles, and of narrow ones, for a run on the stream that [`Self::parts`]
    /// was called with.
    pub(crate) fn kv_maps(&mut self, stream: &Stream, [wide, narrow]: [MappedKv; 2]) -> Result<[u64; 2], EngineError> {
        let of_wide = self.maps.kv(&self.shared, stream, wide)?;
        if wide == narrow {
            return Ok([of_wide; 2]);
        }
        let of_narrow = self.maps.kv(&self.shared, stream, narrow)?;
        // If all others were forgotten for these, they may lie where those did.
        Ok([self.maps.kv(&self.shared, stream, wide)?, of_narrow])
    }

    /// The same of Q.
    pub(crate) fn q_maps(&mut self, stream: &Stream, tensor: QueryTensor) -> Result<u64, EngineError> {
        self.maps.queries(&self.shared, stream, tensor)
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { partials, counters, widened, used_on, .. } = self;
        let mut workspace = f.debug_struct("Workspace");
        workspace.field("partials", partials).field("counters", counters).field("widened", widened);
        workspace.field("used_on", used_on).finish()
    }
}

/// Addresses of the parts of a workspace.
pub(crate) struct Parts {
    pub partial_o: u64,
    pub partial_lse: u64,
    /// A [`Scheduler`], which is zero between runs.
    pub scheduler: u64,
    /// A counter for each row that is merged; zero between runs.
    pub lse_readers: u64,
    /// K and V that the plan makes of FP8, if it does.
    pub widened: Option<MappedKv>,
}

/// Where the counters of rows lie among the counters, in bytes: behind the scheduler.
const LSE_READERS_OFFSET: u64 = (size_of::<Scheduler>() as u64).next_multiple_of(ALIGNMENT);

/// What a plan needs of a workspace.
struct Needed {
    /// Where the log-sum-exp of the partials lies, behind their O, in bytes.
    lse_offset: u64,
    partial_bytes: u64,
    counter_bytes: u64,
    widened_bytes: u64,
}

impl Needed {
    fn by(layout: &Layout) -> Self {
        let partials = u64::from(layout.heads.num_groups) * u64::from(layout.num_partial_rows);
        let lse_bytes = partials * size_of::<f32>() as u64;
        let lse_offset = (lse_bytes * u64::from(layout.attended.shape.head_dim())).next_multiple_of(ALIGNMENT);
        let reader_bytes = u64::from(layout.merged_rows) * size_of::<u32>() as u64;
        let bytes_of = |KvTensors { shape, num_slots, .. }: KvTensors| u64::from(num_slots) * shape.kv_bytes_per_slot();
        let widened_bytes = layout.widened.map_or(0, bytes_of);
        Self {
            lse_offset,
            partial_bytes: lse_offset + lse_bytes,
            counter_bytes: LSE_READERS_OFFSET + reader_bytes,
            widened_bytes: widened_bytes.next_multiple_of(2 * ALIGNMENT),
        }
    }
}
