//! Calibrations: what was measured on a device, and the models that fit it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use crate::device::has_words;
use crate::fit::{Fit, Measurement};
use crate::{DeviceModel, KernelFamily};

/// Devices that were measured, by a part of their names, with the models that `packinfer calibrate` wrote.
const MEASURED: [(&str, &str); 2] =
    [("H100", include_str!("../devices/h100.json")), ("H200", include_str!("../devices/h200.json"))];

/// What was measured on a device, and the models that fit it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Name of the device, as its driver gives it.
    pub device: String,
    /// Where the figures come from: by what and when they were measured, or that they are estimates.
    pub source: String,
    /// The models: at least one, and one at most for each family of kernels and head dimension.
    pub models: Vec<DeviceModel>,
    /// How well each model fits; none for estimates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fits: Vec<Fit>,
    /// What the models were fitted to; none for estimates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub measurements: Vec<Measurement>,
}

/// Why something is no calibration, or none for a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrationError {
    /// A file that cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A file that is no calibration.
    #[error("{}: {error}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// Why.
        error: Box<CalibrationError>,
    },
    /// Text that is no calibration in JSON.
    #[error("not a calibration: {0}")]
    Json(serde_json::Error),
    /// A calibration without models.
    #[error(
        "the calibration of {device} has no models: `packinfer calibrate` writes one for each family of kernels and head dimension"
    )]
    NoModels {
        /// The device.
        device: String,
    },
    /// Two models of the same.
    #[error("the calibration of {device} has two models of the {family} kernels with head dimension {head_dim}: remove one")]
    Twice {
        /// The device.
        device: String,
        /// The kernels.
        family: KernelFamily,
        /// The head dimension.
        head_dim: u32,
    },
    /// A number that no device has.
    #[error("the model of the {family} kernels with head dimension {head_dim} has {name} {value:e}, which no device has")]
    Implausible {
        /// The kernels.
        family: KernelFamily,
        /// The head dimension.
        head_dim: u32,
        /// The number.
        name: &'static str,
        /// What it is.
        value: f64,
    },
    /// A calibration of another device.
    #[error(
        "the calibration is of {calibrated} with {calibrated_sms} multiprocessors, and this is {device} with {sms}: calibrate this one"
    )]
    OtherDevice {
        /// The device that it is of.
        calibrated: String,
        /// Its multiprocessors.
        calibrated_sms: u32,
        /// The device that it was to be used for.
        device: String,
        /// Its multiprocessors.
        sms: u32,
    },
}

impl Calibration {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or is no calibration; the error names the file.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, CalibrationError> {
        let path = path.as_ref();
        let text = fs::read_to_string(path).map_err(|error| CalibrationError::Read { path: path.into(), error })?;
        Self::from_json(&text).map_err(|error| CalibrationError::InFile { path: path.into(), error: Box::new(error) })
    }

    /// Reads and checks a calibration in JSON.
    ///
    /// # Errors
    ///
    /// Text that is not JSON or lacks something, with its line and column; no models, two of the same, or numbers that no device
    /// has.
    pub fn from_json(text: &str) -> Result<Self, CalibrationError> {
        let calibration: Self = serde_json::from_str(text).map_err(CalibrationError::Json)?;
        calibration.check()?;
        Ok(calibration)
    }

    /// The calibration in JSON, a line for each model, fit and measurement.
    pub fn to_json(&self) -> String {
        fn lines<T: Serialize>(list: &[T]) -> String {
            let line = |entry| serde_json::to_string(entry).unwrap_or_default(); // numbers and strings can be written
            list.iter().map(line).collect::<Vec<_>>().join(",\n")
        }
        let text = |text: &str| serde_json::Value::from(text);
        format!(
            "{{\"device\": {}, \"source\": {},\n\"models\": [\n{}],\n\"fits\": [\n{}],\n\"measurements\": [\n{}]}}\n",
            text(&self.device),
            text(&self.source),
            lines(&self.models),
            lines(&self.fits),
            lines(&self.measurements)
        )
    }

    /// The models, for a device of that name and so many multiprocessors.
    ///
    /// # Errors
    ///
    /// Another number of multiprocessors than the device has that was calibrated.
    pub fn models_for(&self, device: &str, num_sms: u32) -> Result<&[DeviceModel], CalibrationError> {
        match self.models.iter().find(|model| model.num_sms != num_sms) {
            None => Ok(&self.models),
            Some(model) => Err(CalibrationError::OtherDevice {
                calibrated: self.device.clone(),
                calibrated_sms: model.num_sms,
                device: device.into(),
                sms: num_sms,
            }),
        }
    }

    /// The models of a device of that name, if one was measured.
    pub(crate) fn measured_models(device: &str) -> Option<Vec<DeviceModel>> {
        static ALL: LazyLock<Vec<(&str, Calibration)>> = LazyLock::new(|| {
            let parse = |(name, text): (&'static str, &str)| Some((name, Calibration::from_json(text).ok()?));
            MEASURED.into_iter().filter_map(parse).collect()
        });
        let of = |name: &str| ALL.iter().find(|(known, _)| *known == name).map(|(_, calibration)| calibration.models.clone());
        if ["PCIe", "NVL"].iter().any(|form| has_words(device, form)) {
            return None; // another memory or other clocks than those of the same name that were measured
        }
        MEASURED.iter().find(|(name, _)| has_words(device, name)).and_then(|(name, _)| of(name))
    }

    fn check(&self) -> Result<(), CalibrationError> {
        if self.models.is_empty() {
            return Err(CalibrationError::NoModels { device: self.device.clone() });
        }
        for (index, model) in self.models.iter().enumerate() {
            let DeviceModel { kernel_family: family, head_dim, .. } = *model;
            if let Some((name, value)) = model.implausible() {
                return Err(CalibrationError::Implausible { family, head_dim, name, value });
            }
            if self.models[..index].iter().any(|other| (other.kernel_family, other.head_dim) == (family, head_dim)) {
                return Err(CalibrationError::Twice { device: self.device.clone(), family, head_dim });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimates() -> Calibration {
        let models = DeviceModel::estimates_for_device("H100", (9, 0), 132);
        Calibration { device: "H100".into(), source: "estimates".into(), models, fits: vec![], measurements: vec![] }
    }

    #[test]
    fn what_was_measured_is_right() {
        for (name, text) in MEASURED {
            let calibration = Calibration::from_json(text).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(calibration.device.contains(name) && !calibration.source.is_empty(), "{calibration:?}");
        }
        let models = |name| DeviceModel::all_for_device(name, (9, 0), 132);
        let (h100, h200) = (models("NVIDIA H100 80GB HBM3"), models("NVIDIA H200"));
        assert_eq!((h100.len(), h200.len()), (8, 8));
        for (h100, h200) in h100.iter().zip(&h200) {
            assert_eq!((h100.kernel_family, h100.head_dim), (h200.kernel_family, h200.head_dim));
            assert!(h200.bytes_per_s > 1.3 * h100.bytes_per_s);
            assert!((h200.flops_per_s / h100.flops_per_s - 1.0).abs() < 0.15, "they compute alike: {h100:?}, {h200:?}");
        }
        // The family of kernels, the head dimension: each has what its kernels can do.
        for model in h100.iter().chain(&h200) {
            let is_hopper = model.kernel_family == KernelFamily::Sm90a;
            assert_eq!(model.tall.is_some(), is_hopper && model.head_dim <= 128, "{model:?}");
            assert_eq!(model.beside.is_some(), is_hopper && matches!(model.head_dim, 64 | 128), "{model:?}");
            assert!(model.e4m3.is_some(), "{model:?}");
        }
        assert_eq!(models("NVIDIA H100 PCIe").len(), 2);
    }

    #[test]
    fn json_there_and_back() {
        let calibration = estimates();
        assert_eq!(Calibration::from_json(&calibration.to_json()).expect("it was written"), calibration);
    }

    #[test]
    fn what_is_no_calibration_is_refused() {
        let good = estimates().to_json();
        let refused = |old: &str, new: &str, message: &str| {
            assert!(good.contains(old), "{old} is not in {good}");
            let error = Calibration::from_json(&good.replacen(old, new, 1)).expect_err(message).to_string();
            assert!(error.contains(message), "{error:?} does not contain {message:?}");
        };
        refused("{", "", "not a calibration: ");
        refused("\"source\"", "\"sauce\"", "unknown field `sauce`");
        refused("\"item_ns\":", "\"items_ns\":", "unknown field `items_ns`");
        refused("sm_90a", "sm_90", "unknown variant `sm_90`, expected `sm_80` or `sm_90a` at line 4 ");
        refused("sm_90a", "sm_80", "the calibration of H100 has two models of the sm_80 kernels with head dimension 128");
        refused("\"num_sms\":132", "\"num_sms\":0", "the sm_80 kernels with head dimension 128 has num_sms 0e0, which no");
        refused("\"item_ns\":", "\"item_ns\":-", "item_ns -5e2, which no device has");
        refused("\"bytes_per_s\":3000000000000.0", "\"bytes_per_s\":3e19", "bytes_per_s 3e19, which no device has");
        let empty = Calibration { models: vec![], ..estimates() }.to_json();
        let error = Calibration::from_json(&empty).expect_err("no models").to_string();
        assert!(error.starts_with("the calibration of H100 has no models"), "{error}");
        let error = Calibration::read("no/such/file").expect_err("no file").to_string();
        assert!(error.starts_with("cannot read no/such/file: "), "{error}");
    }

    #[test]
    fn another_device_is_refused() {
        let calibration = estimates();
        assert_eq!(calibration.models_for("NVIDIA H100", 132).expect("the same").len(), 2);
        let error = calibration.models_for("NVIDIA H100 PCIe", 114).expect_err("another").to_string();
        assert!(error.contains("of H100 with 132 multiprocessors, and this is NVIDIA H100 PCIe with 114"), "{error}");
    }
}
