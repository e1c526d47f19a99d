//! The consumers: what both tile kinds have in common.

use packinfer_abi::{AttentionParams, TileKind};

use super::shared::{Ring, Shared};
use super::{CONSUMER_THREADS, SCORE_FRAGMENTS, barrier, narrow, wide};
use crate::attention::task::Stamper;
use crate::element::Element;
use crate::ptx::mma::Fragment;
use crate::ptx::wgmma::Accumulator;
use crate::ptx::{warp, warpgroup};

/// A consumer's place and its side of the rings.
pub struct Consumer<const DIM_BLOCKS: usize> {
    pub shared: Shared<DIM_BLOCKS>,
    pub queries: Ring<1>,
    pub k: Ring<2>,
    pub v: Ring<2>,
    /// 0 or 1.
    pub warpgroup: u32,
    /// Of all consumer warps, 0 to 7.
    pub warp: u32,
    pub thread: u32,
    pub lane: u32,
}

impl<const DIM_BLOCKS: usize> Consumer<DIM_BLOCKS> {
    /// Lets `steps` steps go by unused.
    ///
    /// # Safety
    ///
    /// Reached by all threads of this consumer; the task has so many steps that it did not take.
    #[inline(always)]
    pub unsafe fn skip_steps(&mut self, steps: u32) {
        for _ in 0..steps {
            self.take_turn();
            self.pass_turn();
            self.k.wait_full();
            self.k.release(self.lane);
            self.v.wait_full();
            self.v.release(self.lane);
        }
    }

    /// Waits for this warpgroup's turn to start products. The warpgroups take turns step by step, so that one does its softmax
    /// while the other has the tensor cores.
    ///
    /// # Safety
    ///
    /// Reached by all threads of this consumer; both consumers take and pass as many turns.
    #[inline(always)]
    pub unsafe fn take_turn(&self) {
        warpgroup::sync(barrier::TURN + self.warpgroup, CONSUMER_THREADS);
    }

    /// Ends this warpgroup's turn.
    ///
    /// # Safety
    ///
    /// As [`Self::take_turn`].
    #[inline(always)]
    pub unsafe fn pass_turn(&self) {
        warpgroup::arrive(barrier::TURN + 1 - self.warpgroup, CONSUMER_THREADS);
    }

    /// Waits for all consumers.
    ///
    /// # Safety
    ///
    /// Reached by all threads of both consumers.
    #[inline(always)]
    pub unsafe fn sync_consumers(&self) {
        warpgroup::sync(barrier::CONSUMERS, CONSUMER_THREADS);
    }
}

/// Does a consumer's part until no task is left.
///
/// # Safety
///
/// Reached by all threads of the consumer's warpgroup.
#[inline(always)]
pub unsafe fn run<E: Element, const DIM_BLOCKS: usize>(
    params: &AttentionParams,
    shared: Shared<DIM_BLOCKS>,
    warpgroup: u32,
    thread: u32,
) where
    [Fragment; SCORE_FRAGMENTS]: Accumulator<E>,
    [Fragment; DIM_BLOCKS]: Accumulator<E>,
{
    let mut consumer = Consumer {
        shared,
        queries: shared.query_ring(),
        k: shared.k_ring(),
        v: shared.v_ring(),
        warpgroup,
        warp: warp::uniform(thread / 32),
        thread,
        lane: thread % 32,
    };
    let mut tasks = shared.task_ring();
    if warpgroup == 1 {
        consumer.pass_turn(); // the first turn is consumer 0's
    }
    loop {
        tasks.wait_full();
        let Some(task) = shared.read_task(params, tasks.stage) else { break };
        if thread == 0 && warpgroup == 0 {
            Stamper::of(params).begin(task.index);
        }
        match task.item.tile {
            TileKind::Wide => wide::run::<E, DIM_BLOCKS>(&mut consumer, &task),
            TileKind::Narrow => narrow::run::<E, DIM_BLOCKS>(&mut consumer, &task),
        }
        if thread == 0 && warpgroup == 0 {
            Stamper::of(params).end(task.index);
        }
        warp::sync();
        tasks.release(consumer.lane);
    }
    if warpgroup == 0 {
        consumer.take_turn(); // the last turn that was passed on
    }
}
