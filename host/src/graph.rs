//! CUDA graphs: work that is given to a stream once and launched many times (CUDA driver API, Graph Management).

use std::fmt;
use std::ptr;
use std::sync::Arc;

use cust::sys::{self, CUgraph, CUgraphExec, CUstreamCaptureMode};

use crate::context::Shared;
use crate::error::Doing;
use crate::stream::Stream;
use crate::{Engine, EngineError};

/// Work that was captured: the launches of one or more runs, with the addresses and grids that they had.
///
/// A decode step can be launched again for the steps that follow it: [`packinfer_planner::Plan::append`] keeps what the launches
/// depend on, and [`Engine::upload_into`] puts the longer plan where the old one was; [`crate::DevicePlan::keeps_graphs`] tells
/// whether it will.
///
/// ```no_run
/// use half::bf16;
/// use packinfer::{Engine, EngineError, Plan, RunOptions, Tensors};
///
/// # fn steps(engine: &Engine, mut plan: Plan, tensors: impl Fn() -> Tensors<'static, bf16>) -> Result<(), Box<dyn std::error::Error>> {
/// let stream = engine.stream()?;
/// let mut workspace = engine.workspace()?;
/// let mut device_plan = engine.upload(&plan, &stream)?;
/// let mut run = |stream: &_| engine.run(&device_plan, &mut workspace, stream, tensors(), RunOptions::default());
/// run(&stream)?; // allocates what it needs, and makes tensor maps: neither can be captured
/// let graph = engine.capture(&stream, run)?;
/// for slots in [[1000, 4596], [1001, 4597]] {
///     plan.append(&slots)?;
///     engine.upload_into(&mut device_plan, &plan, &stream)?;
///     // SAFETY: plan, workspace and tensors are alive, and the tensors have the slots.
///     unsafe { graph.launch(&stream) }?;
/// }
/// # Ok(())
/// # }
/// ```
pub struct Graph {
    exec: CUgraphExec,
    shared: Arc<Shared>,
}

// SAFETY: the driver's functions may be called with a graph from any thread; launches of one graph come one after the other.
unsafe impl Send for Graph {}

impl Engine {
    /// Captures what `work` gives to the stream, instead of doing it.
    ///
    /// Run the same once before: what the first run of a plan, workspace, Q, K and V on a stream does besides (a workspace that
    /// grows, tensor maps that are made, waiting for the stream of the upload) cannot be captured. Other threads that wait for
    /// the device meanwhile, as those do that allocate its memory, wait for the capture too.
    ///
    /// # Errors
    ///
    /// What `work` returns, such as [`EngineError::Captured`], or what the driver reports; the stream can be used again.
    pub fn capture(&self, stream: &Stream, work: impl FnOnce(&Stream) -> Result<(), EngineError>) -> Result<Graph, EngineError> {
        let mut graph: CUgraph = ptr::null_mut();
        let captured = self.shared().while_capturing(|| {
            let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            // SAFETY: the stream is alive. Only what this thread does from now on is restricted.
            unsafe { sys::cuStreamBeginCapture_v2(stream.as_raw(), mode) }.doing("beginning to capture a stream")?;
            let worked = work(stream);
            // SAFETY: the stream is alive and being captured; the argument is a place for the graph.
            let ended = unsafe { sys::cuStreamEndCapture(stream.as_raw(), &mut graph) }.doing("capturing a stream");
            // What went wrong first says more.
            worked.and(ended)
        });
        let exec = captured.and_then(|()| instantiate(graph));
        let made = exec.map(|exec| Graph { exec, shared: self.shared().clone() });
        if !graph.is_null() {
            // SAFETY: nobody else has the graph, and what was made of it does not need it.
            unsafe { sys::cuGraphDestroy(graph) }.doing("dropping a graph")?;
        }
        made
    }
}

/// Makes a graph that can be launched.
fn instantiate(graph: CUgraph) -> Result<CUgraphExec, EngineError> {
    let mut exec: CUgraphExec = ptr::null_mut();
    // SAFETY: the graph is complete; the argument is a place for the other.
    unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) }.doing("making a graph that can be launched")?;
    Ok(exec)
}

impl Graph {
    /// Gives the captured work to a stream, and does not wait for it.
    ///
    /// # Safety
    ///
    /// What was captured would be right to do now: the plans, workspaces and tensors are alive until the work is done, no other
    /// work uses the workspaces at that time, and plans that were uploaded since kept the graph
    /// ([`crate::DevicePlan::keeps_graphs`]) and fit the tensors (`num_slots`). Plans are uploaded on the same stream, or on one
    /// that waits for it and that it waits for.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<(), EngineError> {
        self.shared.enter()?;
        // SAFETY: both are alive; the caller promises the rest.
        unsafe { sys::cuGraphLaunch(self.exec, stream.as_raw()) }.doing("launching a graph")
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.shared.enter().is_ok() {
            // SAFETY: nobody else has the graph. The driver keeps what launches need until they are done.
            let _ = unsafe { sys::cuGraphExecDestroy(self.exec) };
        }
    }
}
