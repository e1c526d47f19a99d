//! Fits of measurements that a known model made up.

use super::*;

/// A made-up device that is not like the estimate in anything.
fn truth() -> DeviceModel {
    DeviceModel {
        bytes_per_s: 2.6e12,
        cached_bytes_per_s: 6.1e12,
        flops_per_s: 5.3e14,
        item_ns: 900.0,
        displaced_bytes: 3.2e7,
        wide: TileTimes { setup_ns: 4100.0, step_ns: 700.0 },
        tall: Some(TileTimes { setup_ns: 2700.0, step_ns: 1300.0 }),
        narrow: TileTimes { setup_ns: 1700.0, step_ns: 820.0 },
        e4m3: Some(Fp8Times {
            bytes_per_s: 2.2e12,
            wide: TileTimes { setup_ns: 5300.0, step_ns: 1600.0 },
            narrow: TileTimes { setup_ns: 2300.0, step_ns: 1200.0 },
        }),
        launch_ns: 5200.0,
        merge_ns: 2300.0,
        beside: Some(BesideTimes { wide: 1.3, narrow: 2.1, stored_step_ns: 3400.0 }),
        ..DeviceModel::H100
    }
}

/// To begin with.
fn estimate() -> DeviceModel {
    DeviceModel { beside: Some(BesideTimes { wide: 1.0, narrow: 1.0, stored_step_ns: 0.0 }), ..DeviceModel::H100 }
}

fn narrow(columns: u32, cached: bool) -> ItemWork {
    let (rows, columns_bytes) = (2048.0, 512.0 * f64::from(columns));
    let [memory_bytes, cached_bytes] = if cached { [rows, columns_bytes] } else { [rows + columns_bytes, 0.0] };
    ItemWork { tile: TileKind::Narrow, memory_bytes, cached_bytes, steps: columns.div_ceil(64), flops: 0.0 }
}

fn wide(rows: u32, columns: u32, cached: bool) -> ItemWork {
    let rows = f64::from(rows);
    let flops = 512.0 * rows * f64::from(columns.next_multiple_of(64));
    ItemWork {
        tile: TileKind::Wide,
        flops,
        memory_bytes: narrow(columns, cached).memory_bytes + 512.0 * rows,
        ..narrow(columns, cached)
    }
}

/// What the work would take, each time with another error of up to `noise`.
fn measurements(truth: &DeviceModel, noise: f64) -> Vec<Measurement> {
    let lengths = [16, 64, 128, 256, 512, 1024, 2048, 4096];
    let mut works: Vec<(u32, Vec<ItemWork>)> = Vec::new();
    works.extend(lengths.map(|columns| (WIDE_TILE_ROWS, vec![narrow(columns, false)])));
    works.extend(lengths.map(|columns| (WIDE_TILE_ROWS, vec![narrow(columns, true), narrow(2 * columns, true)])));
    for rows in [32, 64, 128, 192] {
        works.extend(lengths.map(|columns| (rows.max(WIDE_TILE_ROWS), vec![wide(rows, columns, true)])));
        works.extend(lengths.map(|columns| (rows.max(WIDE_TILE_ROWS), vec![wide(rows, columns, false)])));
    }
    let mut state = 1u32;
    let mut noisy = |value: f64| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        value * (1.0 + noise * (f64::from(state >> 16) / 32_768.0 - 1.0))
    };
    let mut measure = |model: &DeviceModel, is_fp8, index: usize, (wide_tile_rows, works): (u32, Vec<ItemWork>)| {
        let merged_bytes = index.is_multiple_of(3).then_some(1e6);
        let merge_ns = merged_bytes.map_or(0.0, |bytes| truth.merge_ns + bytes / truth.bytes_per_s * 1e9);
        let mut measurement = Measurement {
            batch: format!("batch {index}"),
            kernel_family: truth.kernel_family,
            head_dim: truth.head_dim,
            is_fp8,
            wide_tile_rows,
            narrow_items: NarrowItems::Alone,
            first_longer_ns: Some(noisy(1e9 * truth.displaced_bytes / truth.bytes_per_s)),
            call_ns: 1e5 + noisy(truth.launch_ns + merge_ns),
            items_ns: 1e5,
            merged_bytes,
            items: Vec::new(),
        };
        let unknowns = unknowns_of(model);
        let time = |work| ItemTime { work, tasks: 100, ns: noisy(predict(&Work::of(work, &measurement), &unknowns)) };
        let items = works.into_iter().map(time).collect();
        measurement.items = items;
        measurement
    };
    let same = works.iter().cloned().enumerate().map(|(index, works)| measure(truth, false, index, works)).collect::<Vec<_>>();
    let fp8 = as_of_fp8(truth);
    let in_fp8 = works.into_iter().enumerate().filter(|(_, (rows, _))| *rows == WIDE_TILE_ROWS);
    let fp8 = in_fp8.map(|(index, works)| measure(&fp8, true, index, works)).collect::<Vec<_>>();
    same.into_iter().chain(fp8).chain(beside(truth)).collect()
}

/// What items would take beside others, in bf16 and in FP8.
fn beside(truth: &DeviceModel) -> Vec<Measurement> {
    let times = truth.beside.expect("the truth has such times");
    let (wide, narrow, unknowns) = (wide(128, 4096, true), narrow(1024, false), unknowns_of(truth));
    let measure = |is_fp8| {
        let measurement = Measurement {
            batch: "beside".into(),
            kernel_family: truth.kernel_family,
            head_dim: truth.head_dim,
            is_fp8,
            wide_tile_rows: WIDE_TILE_ROWS,
            narrow_items: NarrowItems::Beside,
            first_longer_ns: None,
            call_ns: 1e5,
            items_ns: 1e5,
            merged_bytes: None,
            items: Vec::new(),
        };
        let alone_ns = |work| predict(&Work::of(work, &measurement), &unknowns);
        let narrow_ns = if is_fp8 { times.stored_step_ns * f64::from(narrow.steps) } else { times.narrow * alone_ns(narrow) };
        let items = [(wide, times.wide * alone_ns(wide)), (narrow, narrow_ns)];
        let items = items.map(|(work, ns)| ItemTime { work, tasks: 50, ns }).into();
        Measurement { items, ..measurement }
    };
    [false, true].map(measure).into()
}

fn assert_close(found: &DeviceModel, truth: &DeviceModel, tolerance: f64) {
    let numbers = |model: &DeviceModel| {
        let unknowns = unknowns_of(model);
        let fp8 = unknowns_of(&as_of_fp8(model));
        let beside = model.beside.map_or([1.0; 3], |times| [times.wide, times.narrow, times.stored_step_ns]);
        let others = [model.launch_ns, model.merge_ns, model.displaced_bytes];
        unknowns.into_iter().chain(fp8).chain(beside).chain(others).collect::<Vec<_>>()
    };
    for (found, truth) in numbers(found).into_iter().zip(numbers(truth)) {
        assert!((found - truth).abs() <= tolerance * truth, "{found}, not {truth}");
    }
}

#[test]
fn a_known_model_is_found_again() {
    let truth = truth();
    let (model, fit) = fit(&estimate(), &measurements(&truth, 0.0));
    assert_close(&model, &truth, 0.05);
    assert!(fit.median_error < 0.002 && fit.notes.is_empty(), "{fit:?}");
    assert_eq!(fit.batches.len(), 80 + 64);
}

#[test]
fn noise_is_averaged_out() {
    let truth = truth();
    let (model, fit) = fit(&estimate(), &measurements(&truth, 0.05));
    assert_close(&model, &truth, 0.4);
    assert!(fit.median_error > 0.005 && fit.median_error < 0.05, "{fit:?}");
    for measurement in measurements(&truth, 0.0).iter().filter(|measurement| measurement.narrow_items == NarrowItems::Alone) {
        let model = if measurement.is_fp8 { as_of_fp8(&model) } else { model };
        for ItemTime { work, ns, .. } in &measurement.items {
            let predicted = predict(&Work::of(*work, measurement), &unknowns_of(&model));
            assert!((predicted / ns - 1.0).abs() < 0.05, "{predicted}, not {ns}, in {}: {work:?}", measurement.batch);
        }
    }
}

#[test]
fn what_is_not_measured_stays_as_estimated() {
    let estimate = DeviceModel::H100;
    let narrow_only: Vec<_> = measurements(&truth(), 0.0).into_iter().take(8).filter(|m| m.merged_bytes.is_none()).collect();
    let (model, fit) = fit(&estimate, &narrow_only);
    assert_eq!((model.merge_ns, model.flops_per_s), (estimate.merge_ns, estimate.flops_per_s));
    assert!((model.wide.step_ns / estimate.wide.step_ns - 1.0).abs() < 1e-6);
    assert!((model.bytes_per_s / truth().bytes_per_s - 1.0).abs() < 0.02, "{model:?}");
    assert_eq!(fit.notes, ["no batch with merging: merge_ns stays"]);

    let (nothing, fit) = super::fit(&estimate, &[]);
    assert_close(&nothing, &estimate, 1e-9);
    assert_eq!((fit.batches.len(), fit.median_error), (0, 0.0));
}

#[test]
fn what_no_device_takes_for_a_call_is_not_believed() {
    let slow: Vec<_> = measurements(&truth(), 0.0).into_iter().map(|m| Measurement { call_ns: m.items_ns + 4e6, ..m }).collect();
    let (model, fit) = fit(&DeviceModel::H100, &slow);
    assert_eq!(model.implausible(), None);
    assert_eq!(model.launch_ns, DeviceModel::H100.launch_ns);
    assert!((model.bytes_per_s / truth().bytes_per_s - 1.0).abs() < 0.02, "{model:?}");
    assert!(fit.notes.iter().any(|note| note.starts_with("launch_ns would be 4.0")), "{:?}", fit.notes);
}

#[test]
fn nonsense_is_not_believed() {
    let mut absurd = measurements(&truth(), 0.0);
    for (index, measurement) in absurd.iter_mut().enumerate() {
        measurement.items.iter_mut().for_each(|item| item.ns = [1e-3, 1e12, f64::NAN, -5.0][index % 4]);
        measurement.call_ns = 0.0;
    }
    let (model, _) = fit(&DeviceModel::H100, &absurd);
    let (least, most) = (DeviceModel::H100.bytes_per_s / BELIEVED, DeviceModel::H100.bytes_per_s * BELIEVED);
    assert!((least..=most).contains(&model.bytes_per_s), "{model:?}");
    assert!(model.launch_ns == 0.0 && model.item_ns.is_finite(), "{model:?}");
}
