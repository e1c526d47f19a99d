//! Who does what when: the tasks of an attention call on the multiprocessors, as predicted or as they were.

use std::ops::Range;

use packinfer_abi::{TaskStamp, TileKind};
use serde::Serialize;

use crate::cost::{Ns, WorkTimes, memory_need, memory_needed};
use crate::lanes::Lanes;
use crate::{DeviceModel, Plan};

/// More multiprocessors than any device has.
const MOST_SMS: u32 = 1 << 16;

/// When and where each task of a call is done. Task `t` is work item `t / num_groups` for head group `t % num_groups`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Schedule {
    /// Multiprocessors.
    pub num_sms: u32,
    /// Lanes of a multiprocessor: blocks that it works on at a time.
    pub lanes_per_sm: u32,
    /// All tasks, in the order of the plan.
    pub tasks: Vec<TaskTime>,
}

/// When and where a task is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TaskTime {
    /// The multiprocessor.
    pub sm: u32,
    /// Which of its lanes.
    pub lane: u32,
    /// Nanoseconds from the begin of the first task of all.
    pub begin_ns: u64,
    /// When its results are stored.
    pub end_ns: u64,
    /// How long it keeps its lane: to the begin of the lane's next task, or to its own end if it is the last.
    pub taken_ns: u64,
}

/// Why the stamps of a call make no schedule.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum StampError {
    /// Stamps of another plan.
    #[error("there are {found} stamps, and the plan has {needed} tasks")]
    Count {
        /// Stamps.
        found: usize,
        /// Tasks.
        needed: usize,
    },
    /// A task that was not done, or stamps of more than one call.
    #[error("task {task} began at {begin_ns} ns and ended at {end_ns} ns, on multiprocessor {sm}: it has no good stamp")]
    Stamp {
        /// The task.
        task: usize,
        /// Its begin.
        begin_ns: u64,
        /// Its end.
        end_ns: u64,
        /// Its multiprocessor.
        sm: u32,
    },
}

impl Schedule {
    /// What `model` expects: the lane that is free first takes the next task of its queue, or of the other one if that is empty.
    /// Narrow items have more of the memory than their lanes' share as long as all other lanes have wide ones, which need less.
    pub fn predicted(plan: &Plan, model: &DeviceModel) -> Self {
        let num_lanes = model.lanes();
        let num_sms = model.num_sms.clamp(1, num_lanes);
        let num_tasks = plan.items().len() * plan.heads().num_groups as usize;
        let mut tasks = vec![TaskTime { sm: 0, lane: 0, begin_ns: 0, end_ns: 0, taken_ns: 0 }; num_tasks];
        plan.give_out(model, &mut Lanes::default(), |index, Given { lane, begin_ns, taken_ns }| {
            let end_ns = begin_ns.saturating_add(taken_ns);
            tasks[index] = TaskTime { sm: lane % num_sms, lane: lane / num_sms, begin_ns, end_ns, taken_ns };
        });
        Self { num_sms, lanes_per_sm: lanes_per_sm(plan, model), tasks }
    }

    /// What the attention kernel noted of a call of the plan, on the device of `model`.
    ///
    /// # Errors
    ///
    /// Stamps that are not of such a call.
    pub fn achieved(plan: &Plan, model: &DeviceModel, stamps: &[TaskStamp]) -> Result<Self, StampError> {
        let needed = plan.items().len() * plan.heads().num_groups as usize;
        if stamps.len() != needed {
            return Err(StampError::Count { found: stamps.len(), needed });
        }
        for (task, &TaskStamp { begin_ns, end_ns, sm, .. }) in stamps.iter().enumerate() {
            if begin_ns == 0 || end_ns < begin_ns || sm >= MOST_SMS {
                return Err(StampError::Stamp { task, begin_ns, end_ns, sm });
            }
        }
        let origin = stamps.iter().map(|stamp| stamp.begin_ns).min().unwrap_or(0);
        let task = |stamp: &TaskStamp| {
            let (begin_ns, end_ns) = (stamp.begin_ns - origin, stamp.end_ns - origin);
            TaskTime { sm: stamp.sm, lane: 0, begin_ns, end_ns, taken_ns: end_ns - begin_ns }
        };
        let most_sm = stamps.iter().map(|stamp| stamp.sm + 1).max().unwrap_or(0);
        let mut schedule = Self {
            num_sms: model.num_sms.clamp(1, MOST_SMS).max(most_sm),
            lanes_per_sm: lanes_per_sm(plan, model),
            tasks: stamps.iter().map(task).collect(),
        };
        let first_beside =
            if plan.is_beside() { plan.num_front_items() as usize * plan.heads().num_groups as usize } else { needed };
        schedule.find_lanes(first_beside);
        Ok(schedule)
    }

    /// Gives each task to the lane of its multiprocessor that ended first, and to each the time until the lane's next begins.
    /// Tasks from `first_beside` on are done beside the others, on the second half of the lanes.
    fn find_lanes(&mut self, first_beside: usize) {
        let mut order: Vec<usize> = (0..self.tasks.len()).collect();
        order.sort_unstable_by_key(|&task| (self.tasks[task].begin_ns, task));
        // For each lane, when its last task ended, and which it was.
        let mut last: Vec<(u64, Option<usize>)> = vec![(0, None); (self.num_sms * self.lanes_per_sm) as usize];
        for index in order {
            let TaskTime { sm, begin_ns, end_ns, .. } = self.tasks[index];
            let lanes = &mut last[(sm * self.lanes_per_sm) as usize..][..self.lanes_per_sm as usize];
            let others = if first_beside < self.tasks.len() { lanes.len() / 2 } else { lanes.len() };
            let of_kind = if index < first_beside { 0..others } else { others..lanes.len() };
            let lanes = lanes.iter_mut().enumerate().filter(|(lane, _)| of_kind.contains(lane));
            let Some((lane, before)) = lanes.min_by_key(|(_, (end, _))| *end) else { continue };
            if let Some(before) = before.1.replace(index) {
                let before = &mut self.tasks[before];
                before.taken_ns = begin_ns - before.begin_ns;
            }
            before.0 = end_ns;
            self.tasks[index].lane = lane as u32;
        }
    }

    /// Nanoseconds from the begin of the first task to the end of the last.
    pub fn span_ns(&self) -> u64 {
        self.tasks.iter().map(|task| task.end_ns).max().unwrap_or(0)
    }

    /// The tasks that were done while every lane had one, with their numbers: they had their share of the device. The first of
    /// each lane is left out, which found the device empty.
    pub fn tasks_of_full_device(&self) -> impl Iterator<Item = (usize, &TaskTime)> {
        self.later_tasks(self.tasks.iter().map(|task| task.begin_ns).max().unwrap_or(0))
    }

    /// The tasks that ended until then, without the first of each lane, with their numbers.
    pub fn later_tasks(&self, until_ns: u64) -> impl Iterator<Item = (usize, &TaskTime)> {
        let first_begins = self.first_begins();
        let all = self.tasks.iter().enumerate();
        all.filter(move |(_, task)| task.begin_ns > first_begins[self.lane_of(task)] && task.begin_ns + task.taken_ns <= until_ns)
    }

    /// The first task of each lane that had one, with their numbers.
    pub fn first_tasks(&self) -> impl Iterator<Item = (usize, &TaskTime)> {
        let first_begins = self.first_begins();
        self.tasks.iter().enumerate().filter(move |(_, task)| task.begin_ns == first_begins[self.lane_of(task)])
    }

    /// The number of a task's lane among those of all multiprocessors.
    fn lane_of(&self, task: &TaskTime) -> usize {
        (task.sm * self.lanes_per_sm + task.lane) as usize
    }

    /// When the first task of each lane began.
    fn first_begins(&self) -> Vec<u64> {
        let mut first_begins = vec![u64::MAX; (self.num_sms * self.lanes_per_sm) as usize];
        for task in &self.tasks {
            let first = &mut first_begins[self.lane_of(task)];
            *first = task.begin_ns.min(*first);
        }
        first_begins
    }

    /// What each multiprocessor does.
    pub fn loads(&self) -> Vec<SmLoad> {
        let mut loads: Vec<_> = (0..self.num_sms).map(|sm| SmLoad { sm, tasks: 0, busy_us: 0.0, end_us: 0.0 }).collect();
        for task in &self.tasks {
            let load = &mut loads[task.sm as usize];
            load.tasks += 1;
            load.busy_us += task.taken_ns as f64 * 1e-3 / f64::from(self.lanes_per_sm);
            load.end_us = load.end_us.max(task.end_ns as f64 * 1e-3);
        }
        loads
    }

    /// When the lanes end, on average.
    fn mean_lane_end_ns(&self) -> f64 {
        let mut ends = vec![0; (self.num_sms * self.lanes_per_sm) as usize];
        for task in &self.tasks {
            let end = &mut ends[self.lane_of(task)];
            *end = task.end_ns.max(*end);
        }
        ends.iter().sum::<u64>() as f64 / ends.len().max(1) as f64
    }

    /// The schedule in a few numbers.
    pub fn summary(&self) -> ScheduleSummary {
        let loads = self.loads();
        let span_us = self.span_ns() as f64 * 1e-3;
        let mut busy: Vec<f64> = loads.iter().map(|load| load.busy_us).collect();
        busy.sort_unstable_by(f64::total_cmp);
        let mean = |sum: f64| sum / loads.len().max(1) as f64;
        let mean_busy = mean(busy.iter().sum());
        let busy_at = |index: usize| busy.get(index).copied().unwrap_or(0.0);
        ScheduleSummary {
            span_us,
            least_busy_us: busy_at(0),
            median_busy_us: busy_at(busy.len() / 2),
            most_busy_us: busy_at(busy.len().saturating_sub(1)),
            idle_at_end_us: span_us - self.mean_lane_end_ns() * 1e-3,
            utilization: if span_us > 0.0 { mean_busy / span_us } else { 1.0 },
        }
    }
}

/// Lanes of a multiprocessor: one for each block, and another one where blocks do a kind of items beside the other.
fn lanes_per_sm(plan: &Plan, model: &DeviceModel) -> u32 {
    let lanes_per_block = if plan.is_beside() { 2 } else { 1 };
    model.lanes().div_ceil(model.num_sms.max(1)).max(1) * lanes_per_block
}

/// A task that a lane was given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Given {
    lane: u32,
    begin_ns: Ns,
    taken_ns: Ns,
}

impl Plan {
    /// Gives all tasks to the lanes of a device, as [`Schedule::predicted`] says, and tells of each. Leaves the loads of the
    /// device's blocks in `lanes`: of lanes for either kind those that end last.
    pub(crate) fn give_out(&self, model: &DeviceModel, lanes: &mut Lanes, tell: impl FnMut(usize, Given)) {
        if self.beside {
            self.give_out_beside(model, lanes, tell);
        } else {
            self.give_out_in_turn(model, lanes, tell);
        }
    }

    /// The same where a lane does narrow tasks beside wide ones: they have lanes of their own, behind the others.
    fn give_out_beside(&self, model: &DeviceModel, lanes: &mut Lanes, mut tell: impl FnMut(usize, Given)) {
        let num_lanes = model.lanes();
        let num_front = self.num_front_items as usize;
        let (wide, narrow) = ((TileKind::Wide, 0..num_front), (TileKind::Narrow, num_front..self.items.len()));
        let [wide_end, narrow_end] =
            [&wide, &narrow].map(|(tile, items)| self.give_out_kind(*tile, items.clone(), Ns::MAX, model, lanes, |_, _| {}));
        // Whichever kind ends first has others beside it to its end.
        let first_end = wide_end.min(narrow_end);
        let mut of_kinds = [(wide, 0), (narrow, num_lanes)];
        // The kind that ends last comes last: its loads are those of the blocks.
        if wide_end > narrow_end {
            of_kinds.reverse();
        }
        for ((tile, items), first_lane) in of_kinds {
            self.give_out_kind(tile, items, first_end, model, lanes, |index, given| {
                tell(index, Given { lane: first_lane + given.lane, ..given });
            });
        }
    }

    /// Gives the tasks of a kind to lanes, which have the other kind beside them until some time; and returns when they end.
    fn give_out_kind(
        &self,
        tile: TileKind,
        items: Range<usize>,
        beside_until: Ns,
        model: &DeviceModel,
        lanes: &mut Lanes,
        mut tell: impl FnMut(usize, Given),
    ) -> Ns {
        let (factor, displacing_ns) = (self.factor_of(tile, model), self.displacing_ns(tile, model));
        lanes.reset(model.lanes());
        for (index, times) in self.tasks_in_order(items, model) {
            let Some((begin_ns, lane)) = lanes.first() else { break };
            let times = if begin_ns == 0 { times.after(displacing_ns / factor) } else { times };
            let taken_ns = time_beside(times.full(), factor, beside_until.saturating_sub(begin_ns) as f64) as Ns;
            tell(index, Given { lane, begin_ns, taken_ns });
            lanes.add(taken_ns);
        }
        lanes.max()
    }

    /// The tasks of a queue, in the order in which they are begun, and what they take.
    fn tasks_in_order(&self, items: Range<usize>, model: &DeviceModel) -> impl Iterator<Item = (usize, WorkTimes)> {
        let groups = self.heads.num_groups as usize;
        let is_front = items.end <= self.num_front_items as usize;
        let at_once = if is_front { self.groups_at_once as usize } else { groups };
        (0..groups).step_by(at_once.max(1)).flat_map(move |first| {
            let groups_here = first..(first + at_once).min(groups);
            let of_item = move |(item, times)| groups_here.clone().map(move |group| (item * groups + group, times));
            items.clone().zip(self.times_of(items.clone(), model)).flat_map(of_item)
        })
    }

    /// What a block's first item waits for, if its tile is of a kind: the memory stores what others have left in the cache, unless
    /// the call leaves it there.
    pub(crate) fn displacing_ns(&self, tile: TileKind, model: &DeviceModel) -> f64 {
        if self.settled_bytes[tile as usize] == 0 { 0.0 } else { 1e9 * model.displaced_bytes / model.bytes_per_s }
    }

    /// The same where a lane does one task at a time.
    fn give_out_in_turn(&self, model: &DeviceModel, lanes: &mut Lanes, mut tell: impl FnMut(usize, Given)) {
        let num_lanes = model.lanes();
        let back_lanes = self.back_lanes.min(num_lanes);
        let front_items = self.num_front_items as usize;
        let has_queues = front_items < self.items.len();
        let front_need = if has_queues { memory_need(self.times_of(0..front_items, model)) } else { 1.0 };
        let groups = self.heads.num_groups as usize;
        let mut queues = [0..front_items, front_items..self.items.len()].map(|items| self.tasks_in_order(items, model));
        let displacing_ns = [TileKind::Wide, TileKind::Narrow].map(|tile| self.displacing_ns(tile, model));
        lanes.reset(num_lanes);
        while let Some((begin_ns, lane)) = lanes.first() {
            let own = usize::from(lane >= num_lanes - back_lanes);
            let Some((index, times)) = queues[own].next().or_else(|| queues[1 - own].next()) else { break };
            let is_front = index < front_items * groups;
            let times = if begin_ns == 0 { times.after(displacing_ns[self.items[index / groups].tile as usize]) } else { times };
            let taken_ns = if is_front {
                times.full_ns()
            } else {
                let front_lanes = lanes.watched() as f64 / f64::from(num_lanes);
                times.with_memory_for(memory_needed(1.0 - front_lanes, front_need)) as Ns
            };
            tell(index, Given { lane, begin_ns, taken_ns });
            lanes.add(taken_ns);
            if has_queues && is_front {
                lanes.watch(begin_ns.saturating_add(taken_ns));
            }
        }
    }
}

/// What something takes that takes `full_ns` by itself, and `factor` times as long while others are beside it, which they are for
/// `beside_ns`.
pub(crate) fn time_beside(full_ns: f64, factor: f64, beside_ns: f64) -> f64 {
    let is_done = full_ns * factor <= beside_ns;
    if is_done { full_ns * factor } else { full_ns + beside_ns - beside_ns / factor }
}

/// What a multiprocessor does in a call.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SmLoad {
    /// The multiprocessor.
    pub sm: u32,
    /// Tasks that it does.
    pub tasks: u32,
    /// How long it is busy in µs, a part for each of its lanes.
    pub busy_us: f64,
    /// When its last task ends, in µs.
    pub end_us: f64,
}

/// A schedule in a few numbers, in µs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ScheduleSummary {
    /// From the begin of the first task to the end of the last.
    pub span_us: f64,
    /// Busy time of the multiprocessor that is busy least.
    pub least_busy_us: f64,
    /// The median of the busy times.
    pub median_busy_us: f64,
    /// Busy time of the multiprocessor that is busy most.
    pub most_busy_us: f64,
    /// How long a lane waits at the end for the last one, on average.
    pub idle_at_end_us: f64,
    /// Busy time over span, on average.
    pub utilization: f64,
}

#[cfg(test)]
mod tests {
    use packinfer_batch::{AttentionShape, Batch, DType, Mask};

    use super::*;
    use crate::{BesideTimes, KernelFamily, Planner};

    fn plan(requests: u32) -> Plan {
        let shape = AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape");
        let mut batch = Batch::new(shape, Mask::Causal);
        for request in 0..requests {
            batch.push_contiguous(1, 500 + 100 * request, request * 10_000).expect("a good request");
        }
        Planner::new(DeviceModel::H100).plan(&batch).expect("a batch that can be planned")
    }

    /// Stamps as they would be if all went as predicted, from a time on, on a device whose lanes have no numbers.
    fn stamps(schedule: &Schedule, from: u64) -> Vec<TaskStamp> {
        let stamp = |task: &TaskTime| TaskStamp {
            begin_ns: from + task.begin_ns,
            end_ns: from + task.end_ns,
            sm: task.sm,
            ..TaskStamp::default()
        };
        schedule.tasks.iter().map(stamp).collect()
    }

    #[test]
    fn the_predicted_schedule_is_that_of_the_explanation() {
        let plan = plan(100);
        let model = DeviceModel::H100;
        let schedule = Schedule::predicted(&plan, &model);
        assert_eq!(schedule.tasks.len(), plan.items().len() * 8);
        assert_eq!((schedule.num_sms, schedule.lanes_per_sm), (132, 2));
        let explanation = plan.explain(&model);
        let summary = schedule.summary();
        assert!((summary.utilization - explanation.balance).abs() < 1e-9);
        assert!(summary.span_us <= explanation.predicted_us);
        assert!(summary.least_busy_us <= summary.median_busy_us && summary.median_busy_us <= summary.most_busy_us);
        assert_eq!(Schedule::predicted(&self::plan(0), &model).summary().span_us, 0.0);
    }

    /// A prompt beside decodes, for persistent blocks that do one task at a time.
    fn mixed_plan() -> (Plan, DeviceModel) {
        mixed_plan_beside(None)
    }

    /// The same for a device where narrow items can be done beside wide ones, and take so long.
    fn mixed_plan_beside(beside: Option<BesideTimes>) -> (Plan, DeviceModel) {
        let shape = AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape");
        let mut batch = Batch::new(shape, Mask::Causal);
        batch.push_contiguous(2048, 4096, 0).expect("a good request");
        for request in 1..100 {
            batch.push_contiguous(1, 2000 + 10 * request, request * 10_000).expect("a good request");
        }
        let models = DeviceModel::all_for_device("H100", (9, 0), 132);
        let model = models.into_iter().find(|model| model.kernel_family == KernelFamily::Sm90a).expect("there is one");
        let model = DeviceModel { beside, ..model };
        (Planner::new(model).plan(&batch).expect("a batch that can be planned"), model)
    }

    #[test]
    fn a_call_takes_no_longer_than_its_bound() {
        let mixed = mixed_plan();
        for (plan, model) in [mixed, (plan(1), DeviceModel::H100), (plan(100), DeviceModel::H100)] {
            let times: Vec<_> = plan.times_of(0..plan.items().len(), &model).collect();
            let (predicted_ns, most_ns) =
                (plan.predicted_ns(&model, &mut Lanes::default()), plan.predicted_at_most_ns(&model, &times));
            assert!((0.5 * most_ns..=most_ns).contains(&predicted_ns), "{predicted_ns} ns, at most {most_ns}");
        }
    }

    #[test]
    fn narrow_tasks_are_done_beside_wide_ones_where_that_is_faster() {
        let (plan, model) = mixed_plan_beside(Some(BesideTimes { wide: 1.2, narrow: 1.1, stored_step_ns: 0.0 }));
        assert!(plan.is_beside());
        let schedule = Schedule::predicted(&plan, &model);
        assert_eq!((schedule.num_sms, schedule.lanes_per_sm), (132, 2));
        let (front, back) = schedule.tasks.split_at(plan.num_front_items() as usize * 8);
        assert!(front.iter().all(|task| task.lane == 0) && back.iter().all(|task| task.lane == 1));
        // Both begin at once, and the call ends with the last of either.
        let at_begin = |tasks: &[TaskTime]| tasks.iter().filter(|task| task.begin_ns == 0).count();
        assert_eq!((at_begin(front), at_begin(back)), (132, 132));
        let end = |tasks: &[TaskTime]| tasks.iter().map(|task| task.end_ns).max().expect("there are tasks");
        let predicted_ns = plan.predicted_ns(&model, &mut Lanes::default());
        assert_eq!(predicted_ns, end(front).max(end(back)) as f64 + model.launch_ns);
        // Faster than one after the other, or it would not have been chosen.
        let (in_turn, one_kind) = mixed_plan();
        assert!(!in_turn.is_beside() && predicted_ns < in_turn.predicted_ns(&one_kind, &mut Lanes::default()));
        // Stamps of a call give the same lanes.
        let achieved = Schedule::achieved(&plan, &model, &stamps(&schedule, 5)).expect("good stamps");
        assert_eq!(
            achieved.tasks.iter().map(|task| task.lane).collect::<Vec<_>>(),
            schedule.tasks.iter().map(|task| task.lane).collect::<Vec<_>>()
        );
        // Not if it takes too long, nor where there is hardly anything to be done beside.
        assert!(!mixed_plan_beside(Some(BesideTimes { wide: 3.0, narrow: 3.0, stored_step_ns: 0.0 })).0.is_beside());
        assert!(!mixed_plan_beside(Some(BesideTimes { wide: 1.0, narrow: 9.0, stored_step_ns: 0.0 })).0.is_beside());
        assert!(!self::plan(100).is_beside());
        // Two blocks on a multiprocessor do two kinds each.
        let two_blocks = DeviceModel { num_sms: 66, blocks_per_sm: 2, ..model };
        let schedule = Schedule::predicted(&plan, &two_blocks);
        assert_eq!((schedule.num_sms, schedule.lanes_per_sm), (66, 4));
        assert_eq!(schedule.loads().len(), 66);
        assert_eq!(schedule.summary().span_us, Schedule::predicted(&plan, &model).summary().span_us);
    }

    /// Each task once, and all items for some of the head groups before the others.
    #[test]
    fn head_groups_take_turns_where_wide_tiles_share_kv() {
        let shape = AttentionShape::new(21, 21, 128, DType::Bf16).expect("a good shape");
        let mut batch = Batch::new(shape, Mask::Causal);
        for request in 0..3 {
            batch.push_contiguous(900, 4000 + request, request * 10_000).expect("a good request");
        }
        let models = DeviceModel::all_for_device("H100", (9, 0), 132);
        let model = models.into_iter().find(|model| model.kernel_family == KernelFamily::Sm90a).expect("there is one");
        let plan = Planner::new(model).plan(&batch).expect("a batch that can be planned");
        assert_eq!(plan.groups_at_once(), 8);
        let tasks: Vec<usize> = plan.tasks_in_order(0..plan.items().len(), &model).map(|(task, _)| task).collect();
        let groups: Vec<usize> = tasks.iter().map(|task| task % 21 / 8).collect();
        assert!(groups.is_sorted() && groups.last() == Some(&2));
        let mut sorted = tasks.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..plan.items().len() * 21));
        assert_eq!(tasks[..9], [0, 1, 2, 3, 4, 5, 6, 7, 21]);
    }

    #[test]
    fn some_lanes_begin_with_what_memory_limits() {
        let (plan, model) = mixed_plan();
        let (front, back) = plan.items().split_at(plan.num_front_items() as usize);
        assert!(front.iter().all(|item| item.tile == TileKind::Wide) && back.iter().all(|item| item.tile == TileKind::Narrow));
        assert!(!front.is_empty() && !back.is_empty() && (1..132).contains(&plan.back_lanes()), "{}", plan.back_lanes());
        let schedule = Schedule::predicted(&plan, &model);
        let at_begin = |tasks: &[TaskTime]| tasks.iter().filter(|task| task.begin_ns == 0).count() as u32;
        let (front, back) = schedule.tasks.split_at(front.len() * 8);
        assert_eq!((at_begin(front), at_begin(back)), (132 - plan.back_lanes(), plan.back_lanes()));
        // The more lanes have wide items, the more of the memory narrow ones have.
        let full_ns = plan.item_times(&model).last().expect("there are items") * 1e3;
        let taken_ns = |task: Option<&TaskTime>| task.map_or(0.0, |task| task.taken_ns as f64);
        let first_full_ns = plan.item_times(&model).nth(front.len() / 8).expect("there are narrow items") * 1e3;
        let (first, last) = (taken_ns(back.first()) / first_full_ns, taken_ns(back.last()) / full_ns);
        assert!(first < 0.8 && first < last && last < 1.001, "{first}, {last}");
        // Whoever has done with the one kind helps with the other.
        assert!(schedule.summary().utilization > 0.9, "{:?}", schedule.summary());
        let decodes = self::plan(100);
        assert_eq!((decodes.num_front_items() as usize, decodes.back_lanes()), (decodes.items().len(), 0));
    }

    #[test]
    fn what_ends_first_has_others_beside_it() {
        assert_eq!(time_beside(10.0, 1.5, f64::MAX), 15.0);
        assert_eq!(time_beside(10.0, 1.5, 15.0), 15.0);
        // 4 of 10 are done by then.
        assert_eq!(time_beside(10.0, 1.5, 6.0), 12.0);
        assert_eq!(time_beside(10.0, 1.5, 0.0), 10.0);
    }

    #[test]
    fn first_items_wait_for_what_others_left_in_the_cache() {
        let (plan, with) = (plan(132), DeviceModel { displaced_bytes: 3e7, ..DeviceModel::H100 });
        let [without, with] = [DeviceModel::H100, with].map(|model| Schedule::predicted(&plan, &model));
        for (number, task) in with.first_tasks() {
            assert_eq!(task.taken_ns - without.tasks[number].taken_ns, 10_000, "{task:?}"); // at 3 TB/s
        }
        assert_eq!(with.span_ns() - without.span_ns(), 10_000);
    }

    #[test]
    fn stamps_give_the_schedule_back() {
        let plan = plan(100);
        let model = DeviceModel::H100;
        let predicted = Schedule::predicted(&plan, &model);
        let achieved = Schedule::achieved(&plan, &model, &stamps(&predicted, 77_000)).expect("good stamps");
        assert_eq!(achieved.span_ns(), predicted.span_ns());
        for (achieved, predicted) in achieved.tasks.iter().zip(&predicted.tasks) {
            assert_eq!((achieved.sm, achieved.begin_ns), (predicted.sm, predicted.begin_ns));
        }
        // Between two tasks of a lane there is no pause here, whichever of the lanes they were given to.
        let busy = |schedule: &Schedule| schedule.tasks.iter().map(|task| task.taken_ns).sum::<u64>();
        assert_eq!(busy(&achieved), busy(&predicted));
        assert!(achieved.tasks_of_full_device().count() > 0);
        assert!(achieved.tasks_of_full_device().all(|(_, task)| task.begin_ns > 0));
    }

    #[test]
    fn stamps_of_something_else_are_refused() {
        let plan = plan(10);
        let model = DeviceModel::H100;
        let good = stamps(&Schedule::predicted(&plan, &model), 1);
        let achieved = |stamps: &[TaskStamp]| Schedule::achieved(&plan, &model, stamps);
        let error = achieved(&good[1..]).expect_err("one too few").to_string();
        assert_eq!(error, format!("there are {} stamps, and the plan has {} tasks", good.len() - 1, good.len()));
        for bad in [TaskStamp::default(), TaskStamp { begin_ns: 9, end_ns: 8, ..good[0] }, TaskStamp { sm: u32::MAX, ..good[0] }]
        {
            let error = achieved(&[&[bad], &good[1..]].concat()).expect_err("a bad stamp").to_string();
            assert!(error.starts_with("task 0 began at "), "{error}");
        }
    }
}
