//! Runs that follow each other closely, and graphs of them.

use half::{bf16, f16};
use packinfer::{Batch, EngineError, Headroom, Mask, Packing};

use crate::DECODE;
use crate::case::{Case, DeviceCase, contiguous, engine, shape};

/// Layers of a step, with other results each, so that a run that began too early would spoil another's partial results.
fn layers(num_layers: u32) -> Vec<Case<bf16>> {
    let layer = |layer| {
        let mut case = Case::<bf16>::new(contiguous(shape::<bf16>(8, 128), Mask::Causal, &DECODE));
        case.scale = Some(0.05 + 0.01 * layer as f32);
        case
    };
    (0..num_layers).map(layer).collect()
}

#[test]
fn layers_wait_for_each_other() {
    let Some(engine) = engine() else { return };
    let cases = layers(8);
    let expected: Vec<_> = cases.iter().map(|case| case.run(engine, Packing::Packed)).collect();
    let stream = engine.stream().expect("a stream");
    let plan = cases[0].plan(engine, Packing::Packed);
    assert!(!plan.merge_tokens().is_empty());
    let plan = engine.upload(&plan, &stream).expect("the plan fits");
    let mut workspace = engine.workspace().expect("there is room");
    let mut devices: Vec<_> = cases.iter().cycle().take(200).map(|case| case.on_device(engine)).collect();
    for device in &mut devices {
        device.run(engine, &plan, &mut workspace, &stream).expect("the run is right");
    }
    for (index, device) in devices.iter().enumerate() {
        assert!(device.results() == expected[index % cases.len()], "layer {index}");
    }
}

#[test]
fn captured_layers_wait_for_each_other() {
    let Some(engine) = engine() else { return };
    let cases = layers(8);
    let stream = engine.stream().expect("a stream");
    let plan = engine.upload(&cases[0].plan(engine, Packing::Packed), &stream).expect("the plan fits");
    let mut workspace = engine.workspace().expect("there is room");
    let mut devices: Vec<DeviceCase<bf16>> = cases.iter().map(|case| case.on_device(engine)).collect();
    let mut step = |stream: &_| devices.iter_mut().try_for_each(|device| device.run(engine, &plan, &mut workspace, stream));
    step(&stream).expect("the runs are right");
    let graph = engine.capture(&stream, &mut step).expect("the second time needs nothing new");
    for device in &mut devices {
        device.o.upload(&vec![bf16::ZERO; device.o.len()]).expect("the length is the same");
    }
    for _ in 0..20 {
        // SAFETY: everything is alive, and nothing else uses it.
        unsafe { graph.launch(&stream) }.expect("the graph can be launched");
    }
    for (case, device) in cases.iter().zip(&devices) {
        assert!(device.results() == case.run(engine, Packing::Packed));
    }
}

#[test]
fn what_cannot_be_captured_says_so() {
    let Some(engine) = engine() else { return };
    let case = Case::<f16>::new(contiguous(shape::<f16>(4, 64), Mask::Causal, &DECODE));
    let [stream, other] = [(); 2].map(|()| engine.stream().expect("a stream"));
    let plan = case.plan(engine, Packing::Packed);
    let mut on_device = engine.upload(&plan, &other).expect("the plan fits");
    let mut workspace = engine.workspace().expect("there is room");
    let mut device = case.on_device(engine);
    let is_captured = |error| matches!(error, EngineError::Captured { .. });

    let error = engine.capture(&stream, |stream| device.run(engine, &on_device, &mut workspace, stream));
    assert!(is_captured(error.expect_err("the workspace has to grow")));
    workspace.reserve(&on_device).expect("there is room");
    let error = engine.capture(&stream, |stream| device.run(engine, &on_device, &mut workspace, stream));
    assert!(is_captured(error.expect_err("the upload was on another stream")));
    let error = engine.capture(&stream, |stream| engine.upload_into(&mut on_device, &plan, stream));
    assert!(is_captured(error.expect_err("plans are uploaded between launches")));
    let error = engine.capture(&stream, |_| engine.zeros::<u8>(1).map(drop));
    assert!(is_captured(error.expect_err("memory is not allocated by a graph")));
    let error = engine.capture(&stream, |_| engine.synchronize());
    assert!(is_captured(error.expect_err("the device never comes to an end of what is captured")));
    let error = engine.capture(&stream, |stream| engine.capture(stream, |_| Ok(())).map(drop));
    assert!(is_captured(error.expect_err("one capture at a time")));

    // The stream is as before.
    device.run(engine, &on_device, &mut workspace, &stream).expect("the run is right");
    case.check(&device.results());
    let graph = engine.capture(&stream, |stream| device.run(engine, &on_device, &mut workspace, stream));
    // SAFETY: everything is alive, and nothing else uses it.
    unsafe { graph.expect("nothing new is needed").launch(&stream) }.expect("the graph can be launched");
    case.check(&device.results());
}

/// A decode step is captured, and its graph launched for the next steps, whose plans are uploaded in between.
#[test]
fn captured_steps_grow() {
    let Some(engine) = engine() else { return };
    const STEPS: u32 = 20;
    let lengths: Vec<u32> = (0..40).map(|request| 1 + 97 * request).chain([60_000]).collect();
    let at_step = |step: u32| {
        let mut batch = Batch::new(shape::<bf16>(4, 128), Mask::Causal);
        let mut first_slot = 0;
        for len in &lengths {
            batch.push_contiguous(1, len + step, first_slot).expect("good lengths");
            first_slot += len + STEPS;
        }
        batch
    };
    let stream = engine.stream().expect("a stream");
    let headroom = Headroom { steps: STEPS, runs: 0 };
    let mut plan = engine.planner().with_headroom(headroom).plan(&at_step(0)).expect("the batch can be planned");
    // The tensors of the last step, which has the most slots.
    let last = Case::<bf16>::new(at_step(STEPS));
    let mut device = last.on_device(engine);
    let mut workspace = engine.workspace().expect("there is room");
    let mut device_plan = engine.upload(&plan, &stream).expect("the plan fits");
    device.run(engine, &device_plan, &mut workspace, &stream).expect("the run is right");
    let run = |stream: &_| device.run(engine, &device_plan, &mut workspace, stream);
    let graph = engine.capture(&stream, run).expect("the second run needs nothing new");
    for step in 0..STEPS {
        let mut first_slot = 0;
        let slots: Vec<u32> = lengths
            .iter()
            .map(|len| {
                let slot = first_slot + len + step;
                first_slot += len + STEPS;
                slot
            })
            .collect();
        plan.append(&slots).expect("there is room");
        assert!(device_plan.keeps_graphs(&plan).expect("the plan fits"));
        engine.upload_into(&mut device_plan, &plan, &stream).expect("the plan fits");
        // SAFETY: everything is alive, and the tensors have all slots.
        unsafe { graph.launch(&stream) }.expect("the graph can be launched");
    }
    last.check(&device.results());
}
