//! The findings that are allowed, each with its reason.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::report::Finding;

/// What a file allows.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllowList {
    #[serde(default)]
    allow: Vec<Entry>,
}

/// One kind of finding in one kernel.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// Name of the kernel.
    kernel: String,
    /// The hardware that it is assembled for; every one if left out.
    hardware: Option<String>,
    /// `spills`, or a part of the warning's text, such as `C7510`.
    finding: String,
    /// Why it may stay.
    reason: String,
    #[serde(skip)]
    used: bool,
}

impl AllowList {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// It cannot be read, is not of that form, or gives no reason.
    pub fn read(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        Self::parse(&text).with_context(|| format!("in {}", file.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let list: Self = toml::from_str(text)?;
        for entry in &list.allow {
            ensure!(!entry.finding.is_empty(), "the entry for {} says no finding", entry.kernel);
            ensure!(!entry.reason.trim().is_empty(), "the entry for {} gives no reason", entry.kernel);
        }
        Ok(list)
    }

    /// Why a finding is allowed, if it is.
    pub fn reason(&mut self, kernel: &str, hardware: &str, finding: &Finding) -> Option<&str> {
        let entry = self.allow.iter_mut().find(|entry| {
            let of_this_finding = match finding {
                Finding::Spills { .. } => entry.finding == "spills",
                Finding::Warning(line) => line.contains(&entry.finding),
            };
            of_this_finding && entry.kernel == kernel && entry.hardware.as_ref().is_none_or(|only| only == hardware)
        })?;
        entry.used = true;
        Some(&entry.reason)
    }

    /// The entries that allowed nothing.
    pub fn unused(&self) -> impl Iterator<Item = String> {
        self.allow.iter().filter(|entry| !entry.used).map(|entry| format!("{} in {}", entry.finding, entry.kernel))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "[[allow]]\nkernel = \"slow\"\nfinding = \"spills\"\nreason = \"measures, is not measured\"\n\
        [[allow]]\nkernel = \"slow\"\nhardware = \"sm_90a\"\nfinding = \"C7510\"\nreason = \"as above\"\n";

    #[test]
    fn only_what_is_listed_is_allowed() {
        let mut list = AllowList::parse(TEXT).unwrap();
        let spills = Finding::Spills { store_bytes: 4, load_bytes: 4 };
        let warning = Finding::Warning("ptxas info : (C7510) Potential Performance Loss".to_owned());
        assert_eq!(list.reason("slow", "sm_80", &spills), Some("measures, is not measured"));
        assert_eq!(list.reason("fast", "sm_80", &spills), None);
        assert_eq!(list.reason("slow", "sm_80", &warning), None);
        assert_eq!(list.unused().collect::<Vec<_>>(), ["C7510 in slow"]);
        assert_eq!(list.reason("slow", "sm_90a", &warning), Some("as above"));
        assert_eq!(list.unused().count(), 0);
    }

    #[test]
    fn an_entry_needs_a_reason() {
        assert!(AllowList::parse("").unwrap().allow.is_empty());
        assert!(AllowList::parse(&TEXT.replace("as above", " ")).unwrap_err().to_string().contains("no reason"));
        assert!(AllowList::parse(&TEXT.replace("reason", "because")).is_err());
    }
}
