//! Which tasks a block takes: those of two queues, as [`Scheduler`] says.

use packinfer_abi::{Attendance, AttentionParams, Scheduler, Share};

use super::helpers::Helpers;
use crate::ptx::control;
use crate::ptx::math::divide;
use crate::ptx::memory::{
    compare_and_swap_global_u64, fetch_add_global, fetch_add_global_u64, fetch_add_global_u64_ordered, load_of_device_u64,
    store_global, store_global_u64,
};
use crate::ptx::special::{block_index, num_blocks};

/// The index of a task that there is not.
pub const NO_TASK: u32 = u32::MAX;

/// The queue that a block's producer takes its tasks from. Where narrow tasks are done beside wide ones, it is the front in all
/// blocks, and their [readers](ReaderQueue) have the other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    Front,
    Back,
}

impl Queue {
    /// The queue that this block begins with.
    #[inline(always)]
    pub fn of_block(params: &AttentionParams) -> Self {
        if block_index() < num_blocks() - params.back_blocks { Self::Front } else { Self::Back }
    }

    /// The first task of this block, which no other has. It has one of the queue that it begins with, but for blocks that are
    /// there for their readers.
    #[inline(always)]
    pub fn first_task<H: Helpers>(self, params: &AttentionParams) -> Option<u32> {
        let place = match self {
            Self::Front => block_index(),
            Self::Back => params.front_tasks + block_index() - (num_blocks() - params.back_blocks),
        };
        if H::READ && block_index() >= params.front_tasks { None } else { Some(task_at(params, place)) }
    }

    /// The other queue.
    #[inline(always)]
    pub fn other(self) -> Self {
        match self {
            Self::Front => Self::Back,
            Self::Back => Self::Front,
        }
    }

    /// Draws the next ticket.
    ///
    /// # Safety
    ///
    /// Reached by one thread, before it [leaves](leave).
    #[inline(always)]
    pub unsafe fn draw(self, params: &AttentionParams) -> u32 {
        let taken = params.scheduler + core::mem::offset_of!(Scheduler, taken) as u64;
        fetch_add_global(taken + if self == Self::Front { 0 } else { size_of::<u32>() as u64 }, 1)
    }

    /// The task that a ticket stands for, if the queue has so many.
    #[inline(always)]
    pub fn task(self, params: &AttentionParams, ticket: u32) -> Option<u32> {
        // Every block that begins with the queue has its first task without a ticket.
        let (first, end) = match self {
            Self::Front => (num_blocks() - params.back_blocks, params.front_tasks),
            Self::Back => (params.front_tasks + params.back_blocks, params.num_items * params.heads.num_groups),
        };
        let place = first + ticket;
        if place < end { Some(task_at(params, place)) } else { None }
    }
}

/// The task that comes at a place of both queues, one behind the other.
#[inline(always)]
fn task_at(params: &AttentionParams, place: u32) -> u32 {
    let (groups, at_once) = (params.heads.num_groups, params.groups_at_once);
    if place >= params.front_tasks || at_once >= groups {
        return place;
    }
    // SAFETY: there are tasks, so there are head groups and items; and some groups come at once.
    unsafe {
        let front_items = divide(params.front_tasks, groups);
        let first_group = divide(place, front_items * at_once) * at_once;
        let groups_here = core::cmp::min(at_once, groups - first_group);
        let place_here = place - first_group * front_items;
        let item = divide(place_here, groups_here);
        item * groups + first_group + (place_here - item * groups_here)
    }
}

/// The queue behind the front as the readers of all blocks take from it: each has its first task without a ticket. A task may be
/// [`NO_TASK`].
pub struct ReaderQueue;

impl ReaderQueue {
    /// The first task of this block's readers.
    #[inline(always)]
    pub fn first_task(params: &AttentionParams) -> u32 {
        Self::task_or_none(params, params.front_tasks + block_index())
    }

    /// Draws the next ticket.
    ///
    /// # Safety
    ///
    /// As [`Queue::draw`].
    #[inline(always)]
    pub unsafe fn draw(params: &AttentionParams) -> u32 {
        Queue::Back.draw(params)
    }

    /// The task that a ticket stands for.
    #[inline(always)]
    pub fn task(params: &AttentionParams, ticket: u32) -> u32 {
        Self::task_or_none(params, params.front_tasks + num_blocks() + ticket)
    }

    #[inline(always)]
    fn task_or_none(params: &AttentionParams, task: u32) -> u32 {
        if task < params.num_items * params.heads.num_groups { task } else { NO_TASK }
    }
}

/// That this block has begun, which the others are told; and what they had told until then.
#[derive(Clone, Copy)]
pub struct Beginning(Attendance);

impl Beginning {
    /// Tells the others.
    ///
    /// # Safety
    ///
    /// Reached by one thread, which later does all that [`Self::complete`] and [`leave`] want.
    #[inline(always)]
    pub unsafe fn tell(params: &AttentionParams) -> Self {
        Self(Attendance(fetch_add_global_u64(attendance(params), Attendance::BEGUN)))
    }

    /// If this block was the last to begin, says so.
    ///
    /// # Safety
    ///
    /// Reached once, by the thread that told, before it [leaves](leave).
    #[inline(always)]
    pub unsafe fn complete(self, params: &AttentionParams) {
        if self.0.begun() + 1 < num_blocks() {
            return;
        }
        let mut expected = Attendance(self.0.0 + Attendance::BEGUN);
        loop {
            let before = compare_and_swap_global_u64(attendance(params), expected.0, expected.with_all_begun().0);
            if before == expected.0 {
                return;
            }
            expected = Attendance(before);
        }
    }
}

/// How often a block that has no task left looks whether all have begun, before it leaves without a share: for about 20 µs.
const LOOKS: u32 = 32;
/// How long it waits before it looks again.
const NS_BETWEEN_LOOKS: u32 = 100;

/// Says that this block takes no more tasks, and returns its share of the rows that are merged. Its consumers are mostly still at
/// work.
///
/// # Safety
///
/// Reached by one thread of the producer, after [`Beginning::complete`].
#[inline(always)]
pub unsafe fn leave<H: Helpers>(params: &AttentionParams) -> Share {
    let mut looks = 0;
    while !Attendance(load_of_device_u64(attendance(params))).have_all_begun() && looks < LOOKS {
        control::sleep(NS_BETWEEN_LOOKS);
        looks += 1;
    }
    let before = Attendance(fetch_add_global_u64_ordered(attendance(params), Attendance::LEFT));
    let readers_have_left = !H::READ || before.readers_left() == num_blocks();
    if readers_have_left && before.left() + 1 == num_blocks() {
        prepare_next_launch(params);
    }
    before.share_of_next(num_blocks())
}

/// The same, for the block's readers.
///
/// # Safety
///
/// Reached by one thread of them.
#[inline(always)]
pub unsafe fn readers_leave(params: &AttentionParams) {
    let before = Attendance(fetch_add_global_u64_ordered(attendance(params), Attendance::READERS_LEFT));
    if before.left() == num_blocks() && before.readers_left() + 1 == num_blocks() {
        prepare_next_launch(params);
    }
}

/// When all have left: makes the scheduler ready for the next launch.
#[inline(always)]
unsafe fn prepare_next_launch(params: &AttentionParams) {
    let taken = params.scheduler + core::mem::offset_of!(Scheduler, taken) as u64;
    store_global(taken, 0);
    store_global(taken + size_of::<u32>() as u64, 0);
    store_global_u64(attendance(params), 0);
}

#[inline(always)]
fn attendance(params: &AttentionParams) -> u64 {
    params.scheduler + core::mem::offset_of!(Scheduler, attendance) as u64
}
