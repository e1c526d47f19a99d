//! The engine where there may be no GPU: this program starts either way, and a sentence says what is missing.

use packinfer::{Engine, EngineError, EngineOptions};

#[test]
fn what_is_missing_is_said_in_a_sentence() {
    match Engine::new(EngineOptions::default()) {
        Ok(engine) => {
            let device = engine.device();
            assert!(device.multiprocessors > 0 && device.memory_bytes > 0 && !device.name.is_empty(), "{device:?}");
            assert_eq!(device.kernel_families(), engine.kernel_families());
            assert!(!engine.kernel_families().is_empty());
            assert_eq!(packinfer::devices().expect("the engine has one").first(), Some(device));
        }
        Err(error) => {
            let text = error.to_string();
            let start = match error {
                EngineError::NoDriver(_) => "no NVIDIA driver",
                EngineError::DriverTooOld { .. } => "the NVIDIA driver is too old",
                EngineError::NoDevice => "the NVIDIA driver finds no device",
                EngineError::DeviceTooOld { ref name, .. } => name,
                _ => panic!("a machine without a device for the kernels says: {text}"),
            };
            assert!(text.starts_with(start) && !text.contains('\n'), "{text}");
        }
    }
}

#[test]
fn ordinals_past_the_last_device_are_an_error() {
    let Ok(devices) = packinfer::devices() else { return };
    let count = devices.len() as u32;
    let error =
        Engine::new(EngineOptions { device_ordinal: count, ..EngineOptions::default() }).expect_err("there is no such device");
    assert!(matches!(error, EngineError::NoSuchDevice { ordinal, count: c } if ordinal == count && c == count), "{error}");
}
