//! Replays a trace against a KV pool and a prefix tree, without a GPU.
//!
//! Time advances in decode steps. At each step finished requests leave, waiting ones are admitted in order of arrival as far
//! as their prompts fit (blocks that nobody uses are evicted for them), and every running request appends a token. If that
//! does not fit, the youngest request is preempted and computed again later.
//!
//! ```
//! use packinfer_trace::TraceRequest;
//! use packinfer_trace::kv_sim::{SimConfig, simulate};
//!
//! let ask = |arrival_ms, blocks: [u64; 2]| {
//!     TraceRequest { arrival_ms, prompt_tokens: 1024, output_tokens: 40, blocks: blocks.into() }
//! };
//! let report = simulate(&[ask(0, [7, 8]), ask(5_000, [7, 9])], &SimConfig::default(), |_| {})?;
//! assert_eq!((report.prompt_blocks, report.hit_blocks), (4, 1));
//! # Ok::<(), packinfer_kv::KvError>(())
//! ```

mod plot;
mod report;
mod run;

use packinfer_kv::{Contiguous, KvError, Policy, SlotPool};
use serde::{Deserialize, Serialize};

use crate::{BLOCK_TOKENS, TraceRequest};
pub use plot::plot_svg;
pub use report::{Sample, SimReport};

/// What a trace is replayed against.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SimConfig {
    /// Slots of the pool; `None` for as many as the whole trace can fill, so that nothing is ever evicted.
    pub num_slots: Option<u32>,
    /// Slots of a page.
    pub page_size: u32,
    /// How requests are laid out as they grow.
    pub policy: Policy,
    /// Milliseconds of a decode step: the time between two tokens of a request.
    pub step_ms: u64,
    /// Bytes of KV of one token in all layers, to state moves in bytes.
    pub bytes_per_token: u64,
    /// Times at which usage is sampled, over the whole trace.
    pub samples: u32,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            num_slots: None,
            page_size: 16,
            policy: Policy::Contiguous(Contiguous::default()),
            // About what large models reach under load.
            step_ms: 30,
            // 32 layers of 8 KV heads of 128 elements of 2 bytes, K and V.
            bytes_per_token: 32 * 8 * 128 * 2 * 2,
            samples: 200,
        }
    }
}

impl SimConfig {
    /// Slots of the pool that `requests` are replayed against, in whole pages.
    fn pool_slots(&self, requests: &[TraceRequest]) -> u32 {
        let page_size = self.page_size.max(1);
        self.num_slots.map_or_else(
            || {
                let wanted: u64 = requests.iter().map(|request| most_slots(request, page_size)).sum();
                let most = SlotPool::MAX_SLOTS - SlotPool::MAX_SLOTS % page_size;
                u32::try_from(wanted).unwrap_or(most).min(most)
            },
            |slots| slots - slots % page_size,
        )
    }
}

/// More slots than a request can occupy, headroom and partly filled pages included.
fn most_slots(request: &TraceRequest, page_size: u32) -> u64 {
    let tokens = u64::from(request.prompt_tokens) + u64::from(request.output_tokens);
    // Twice the answer: while it is moved it is there twice. Pages begin with the prompt, the answer and the headroom.
    let slots = tokens + 2 * u64::from(request.output_tokens) + u64::from(BLOCK_TOKENS);
    slots.next_multiple_of(u64::from(page_size)) + 4 * u64::from(page_size)
}

/// Replays `requests`, which are in order of arrival. `progress` is told how many have left the system, every now and then.
///
/// # Errors
///
/// The pool's slots or page size make no pool.
pub fn simulate(requests: &[TraceRequest], config: &SimConfig, progress: impl FnMut(u64)) -> Result<SimReport, KvError> {
    run::Simulation::new(requests, config)?.run(progress)
}
