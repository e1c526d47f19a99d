//! Files that results are written to, in JSON.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

/// A file that is opened before anything is measured: better to learn early that it cannot be written. What it has stays until it
/// is written, and a new one of which nothing comes is removed.
pub struct JsonFile<'a> {
    path: &'a Path,
    file: File,
    is_new: bool,
}

impl<'a> JsonFile<'a> {
    /// Opens the file, if one was asked for.
    pub fn open(path: Option<&'a PathBuf>) -> anyhow::Result<Option<Self>> {
        let open = |path: &'a PathBuf| {
            let is_new = !path.exists();
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
            Ok(Self { path, file: file.with_context(|| cannot_write(path))?, is_new })
        };
        path.map(open).transpose()
    }

    /// Writes something in place of what the file has.
    pub fn write(&mut self, results: &impl Serialize) -> anyhow::Result<()> {
        let mut json = serde_json::to_string_pretty(results)?;
        json.push('\n');
        self.write_text(&json)
    }

    /// The same of something that is JSON already.
    pub fn write_text(&mut self, json: &str) -> anyhow::Result<()> {
        let Self { path, file, is_new } = self;
        *is_new = false;
        let mut replace = || {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(json.as_bytes())
        };
        replace().with_context(|| cannot_write(path))
    }
}

impl Drop for JsonFile<'_> {
    fn drop(&mut self) {
        if self.is_new {
            // Whatever went wrong before is what to tell of.
            let _ = fs::remove_file(self.path);
        }
    }
}

/// What went wrong, for whatever reason.
pub fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_has_stays_until_it_is_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let read = |path: &Path| fs::read_to_string(path).ok();
        let (old, new) = (folder.path().join("old.json"), folder.path().join("new.json"));
        fs::write(&old, "what was measured yesterday").expect("it can be written");
        for path in [&old, &new] {
            drop(JsonFile::open(Some(path)).expect("it can be opened"));
        }
        assert_eq!((read(&old).as_deref(), read(&new)), (Some("what was measured yesterday"), None));
        for path in [&old, &new] {
            let mut file = JsonFile::open(Some(path)).expect("it can be opened").expect("it was asked for");
            file.write(&[1, 2, 3]).expect("it can be written");
            file.write(&1).expect("and once more");
            drop(file);
            assert_eq!(read(path).as_deref(), Some("1\n"));
        }
    }
}
