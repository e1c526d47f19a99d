//! Files that results are written to, in JSON.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

/// A file that is there before anything is measured: better to learn early that it cannot be written.
pub struct JsonFile<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> JsonFile<'a> {
    /// Makes the file, if one was asked for.
    pub fn create(path: Option<&'a PathBuf>) -> anyhow::Result<Option<Self>> {
        let create = |path: &'a PathBuf| Ok(Self { path, file: File::create(path).with_context(|| cannot_write(path))? });
        path.map(create).transpose()
    }

    /// Writes something in place of what the file has.
    pub fn write(&mut self, results: &impl Serialize) -> anyhow::Result<()> {
        let Self { path, file } = self;
        let mut json = serde_json::to_vec_pretty(results)?;
        json.push(b'\n');
        let mut replace = || {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(&json)
        };
        replace().with_context(|| cannot_write(path))
    }
}

/// What went wrong, for whatever reason.
pub fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}
