//! Rows that are merged from partials, by a kernel of their own or when no task is left.

use cust::stream::{Stream as RawStream, StreamFlags};
use half::{bf16, f16};
use packinfer::{Batch, DeviceModel, Engine, Mask, Plan, Planner};
use packinfer_abi::{DIRECT, KvRun, TileKind};

use crate::case::{Case, Element, Results, contiguous, engine, shape};
use crate::{DECODE, MIXED};

/// Query heads of a KV head that are one head group: those of a token may lie in one warp, or in several.
const HEADS_PER_GROUP: [u32; 4] = [1, 4, 7, 16];

/// Requests that share prefixes of two levels, and others that are long.
fn batch<E: Element>(heads_per_group: u32, head_dim: u32) -> Batch {
    let mut batch = Batch::new(shape::<E>(heads_per_group, head_dim), Mask::Causal);
    for request in 0..48 {
        let levels = [(0, 1024), (2048 * (1 + request % 3), 512), (20_000 + 64 * request, 3 + request % 40)];
        let runs = levels.map(|(first_slot, num_slots)| KvRun { first_slot, num_slots });
        let kv_len = runs.iter().map(|run| run.num_slots).sum();
        batch.push_runs(1 + request % 3, kv_len, runs).expect("good runs");
    }
    for (query_len, kv_len) in [(90, 1500), (1, 12_000), (33, 2000), (1, 777)] {
        batch.push_contiguous(query_len, kv_len, batch.num_slots()).expect("good lengths");
    }
    batch
}

/// A model by which whatever can be split is: memory is slow, and merging costs nothing.
fn splitting(model: DeviceModel) -> DeviceModel {
    DeviceModel { bytes_per_s: 1e10, item_ns: 10.0, merge_ns: 0.0, ..model }
}

/// Planners for each family of kernels that the engine uses, which split whatever can be split.
fn splitting_planners(engine: &Engine) -> Vec<Planner> {
    let models = engine.device().models().into_iter().filter(|model| engine.kernel_families().contains(&model.kernel_family));
    models.map(|model| Planner::new(splitting(model))).collect()
}

/// Whether items of both kinds of tiles leave partials.
fn splits_both_kinds(plan: &Plan) -> bool {
    let splits = |kind| plan.items().iter().any(|item| item.partial_row != DIRECT && item.tile == kind);
    splits(TileKind::Wide) && splits(TileKind::Narrow)
}

fn with_sinks<E: Element>(batch: Batch) -> Case<E> {
    let num_heads = batch.shape().num_qo_heads();
    let sinks = (0..num_heads).map(|head| (3 * head % 17) as f32 - 8.0).collect();
    let mut case = Case::new(batch);
    case.sinks = Some(sinks);
    case
}

/// Runs plans of cases one after the other in one workspace.
fn run_in_turn<E: Element>(engine: &Engine, plans: &[(&Case<E>, &Plan)]) -> Vec<Results<E>> {
    let stream = engine.stream().expect("a stream");
    let mut workspace = engine.workspace().expect("there is room");
    let run = |&(case, plan): &(&Case<E>, &Plan)| {
        let plan = engine.upload(plan, &stream).expect("the plan fits");
        let mut device = case.on_device(engine);
        device.run(engine, &plan, &mut workspace, &stream).expect("the run is right");
        device.results()
    };
    plans.iter().map(run).collect()
}

/// Many rows are merged, with the same bits each time, and plans may follow each other in a workspace.
fn check_merging<E: Element + PartialEq>(head_dim: u32) {
    let Some(engine) = engine() else { return };
    for mut planner in splitting_planners(engine) {
        for heads_per_group in HEADS_PER_GROUP {
            let cases = [
                with_sinks::<E>(batch::<E>(heads_per_group, head_dim)),
                Case::new(contiguous(shape::<E>(heads_per_group, head_dim), Mask::Causal, &[&MIXED[..], &DECODE].concat())),
            ];
            let [many, other] = cases.each_ref().map(|case| (case, planner.plan(&case.batch).expect("a good batch")));
            assert!(splits_both_kinds(&many.1), "{heads_per_group} query heads a group");
            let [many, other] = [(many.0, &many.1), (other.0, &other.1)];
            let results = run_in_turn(engine, &[many, many, other, many, other]);
            many.0.check(&results[0]);
            other.0.check(&results[2]);
            assert!(results[1] == results[0] && results[3] == results[0], "{heads_per_group} query heads a group");
            assert!(results[4] == results[2], "{heads_per_group} query heads a group");
        }
    }
}

#[test]
fn rows_of_all_kinds_of_tiles_are_merged() {
    check_merging::<bf16>(128);
    check_merging::<f16>(64);
    check_merging::<f16>(256);
    check_merging::<bf16>(96);
}

/// A decode request with many partials, and others with few.
const ONE_LONG: [(u32, u32); 4] = [(1, 60_000), (2, 3000), (1, 900), (1, 5)];

fn check_many_partials<E: Element + PartialEq>(head_dim: u32) {
    let Some(engine) = engine() else { return };
    for mut planner in splitting_planners(engine) {
        let case = with_sinks::<E>(contiguous(shape::<E>(5, head_dim), Mask::Causal, &ONE_LONG));
        let plan = planner.plan(&case.batch).expect("a good batch");
        // More than a warp has lanes.
        let most = plan.merge_tokens().iter().map(|token| token.num_sources).max();
        assert!(most.is_some_and(|most| most > 32), "{most:?} partials of a row");
        case.check_plan(engine, &plan);
    }
}

#[test]
fn rows_of_many_partials() {
    check_many_partials::<f16>(128);
    check_many_partials::<bf16>(64);
    check_many_partials::<bf16>(256);
    check_many_partials::<f16>(96);
}

/// A partial may be NaN, whatever its bits, and is not taken for one that is still to come.
#[test]
fn partials_that_are_not_numbers() {
    let Some(engine) = engine() else { return };
    for mut planner in splitting_planners(engine) {
        let mut case = Case::<bf16>::new(contiguous(shape::<bf16>(4, 128), Mask::Causal, &ONE_LONG));
        let plan = planner.plan(&case.batch).expect("a good batch");
        let finite = run_in_turn(engine, &[(&case, &plan)]);
        let is_spoiled = |row: usize| row.is_multiple_of(3);
        case.change_q(|row, _, number| if is_spoiled(row) { bf16::from_bits(u16::MAX) } else { number });
        let spoiled = run_in_turn(engine, &[(&case, &plan), (&case, &plan)]);
        let rows = |results: &Results<bf16>| results.0.chunks(128).map(<[bf16]>::to_vec).collect::<Vec<_>>();
        for results in &spoiled {
            for (row, (numbers, finite)) in rows(results).iter().zip(rows(&finite[0])).enumerate() {
                if is_spoiled(row) {
                    assert!(numbers.iter().all(|number| number.is_nan()), "row {row}: {numbers:?}");
                } else {
                    assert!(*numbers == finite, "row {row}");
                }
            }
        }
    }
}

/// A batch whose plan keeps less than half of the multiprocessors busy for a while, and merges nothing; none where there are no
/// kernels for Hopper.
fn few_long_tasks(engine: &Engine) -> Option<(Case<bf16>, Plan)> {
    let case = Case::<bf16>::new(contiguous(shape::<bf16>(4, 128), Mask::Causal, &[(768, 100_000)]));
    let plan = case.plan_for_hopper(engine, |model| DeviceModel { merge_ns: 1e9, ..model })?;
    assert_eq!(plan.merge_tokens(), []);
    let num_tasks = plan.items().len() as u32 * plan.heads().num_groups;
    assert!(num_tasks > 16 && num_tasks < engine.device().multiprocessors / 2, "{num_tasks} tasks");
    Some((case, plan))
}

/// Some blocks of a launch begin only when others have ended, so these must not wait for them; and whoever merges, O is the same.
#[test]
fn blocks_that_begin_late() {
    let Some(engine) = engine() else { return };
    let Some((holding, holding_plan)) = few_long_tasks(engine) else { return };
    // All rows have partials of all blocks.
    let merging = with_sinks::<bf16>(contiguous(shape::<bf16>(4, 128), Mask::Causal, &[(64, 30_000)]));
    let Some(merging_plan) = merging.plan_for_hopper(engine, splitting) else { return };
    let num_tasks = merging_plan.items().len() as u32 * merging_plan.heads().num_groups;
    assert!(num_tasks >= engine.device().multiprocessors, "{num_tasks} tasks");
    let alone = merging.run_plan(engine, &merging_plan);
    merging.check(&alone);

    // The second launch that merges comes first where there is room.
    let streams = [-1, 0, -1].map(|priority| {
        let raw = RawStream::new(StreamFlags::NON_BLOCKING, Some(priority)).expect("a stream");
        // SAFETY: it is of the primary context, which the engine has made this thread's, and outlives all that is used with it.
        let stream = unsafe { engine.foreign_stream(raw.as_inner()) }.expect("a stream");
        (stream, raw)
    });
    let mut cases = [&holding, &merging, &merging].map(|case| case.on_device(engine));
    let mut runs: Vec<_> = [&holding_plan, &merging_plan, &merging_plan]
        .into_iter()
        .zip(&streams)
        .map(|(plan, (stream, _))| {
            let plan = engine.upload(plan, stream).expect("the plan fits");
            let stamps = engine.stamps(&plan).expect("there is room");
            (stream, plan, engine.workspace().expect("there is room"), stamps)
        })
        .collect();
    let mut end_while_others_hold = || {
        for ((stream, plan, workspace, stamps), case) in runs.iter_mut().zip(&mut cases) {
            case.run_stamped(engine, plan, workspace, stream, stamps).expect("the run is right");
        }
        let mut ends = runs.iter().map(|(.., stamps)| {
            let stamps = stamps.read().expect("the work is done");
            stamps.tasks.iter().chain(&stamps.merges).map(|stamp| stamp.end_ns).collect::<Vec<_>>()
        });
        let held_until = ends.next().and_then(|ends| ends.into_iter().min());
        ends.flatten().max() < held_until
    };
    // Other tests may use the device too: not all of the time.
    let times = (0..20).filter(|_| end_while_others_hold()).count();
    assert!(times > 0, "both always waited for a launch that they have nothing to do with");
    for case in &cases[1..] {
        assert!(case.results() == alone, "whoever merges, O is the same");
    }
}
