//! What kernels declare about themselves in PTX comments, as Rust has no way to say it to the assembler.
//!
//! | comment | what the build does |
//! | --- | --- |
//! | `// packinfer.launch_bounds KERNEL THREADS BLOCKS` | writes `.maxntid` and `.minnctapersm` into the kernel's head |
//! | `// packinfer.expect KERNEL INSTRUCTION COUNT` | fails if the kernel has another number of them |
//!
//! The counts guard against compilers that duplicate a barrier into the branches of a condition: a kernel of which some threads
//! wait at one copy and some at the other hangs.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;

/// The threads of a block and the blocks that a multiprocessor must be able to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LaunchBounds {
    threads: u32,
    blocks_per_sm: u32,
}

/// How often an instruction stands in a kernel.
#[derive(Debug, PartialEq, Eq)]
struct Expectation {
    kernel: String,
    instruction: String,
    count: usize,
}

/// All declarations of a crate.
#[derive(Debug, Default)]
pub struct Declared {
    launch_bounds: BTreeMap<String, LaunchBounds>,
    expectations: Vec<Expectation>,
}

impl Declared {
    /// Reads the declarations in the PTX of a crate.
    ///
    /// # Errors
    ///
    /// A comment that begins like a declaration and is none, or two launch bounds for one kernel.
    pub fn read(text: &str) -> Result<Self> {
        let mut declared = Self::default();
        for line in text.lines() {
            let Some(declaration) = line.trim().strip_prefix("// packinfer.") else { continue };
            declared.add(declaration).with_context(|| format!("in the declaration `{}`", line.trim()))?;
        }
        Ok(declared)
    }

    fn add(&mut self, declaration: &str) -> Result<()> {
        match *declaration.split_whitespace().collect::<Vec<_>>() {
            ["launch_bounds", kernel, threads, blocks] => {
                let bounds = LaunchBounds {
                    threads: threads.parse().context("the threads of a block are a number")?,
                    blocks_per_sm: blocks.parse().context("the blocks of a multiprocessor are a number")?,
                };
                ensure!(self.launch_bounds.insert(kernel.to_owned(), bounds).is_none(), "{kernel} has launch bounds already");
            }
            ["expect", kernel, instruction, count] => self.expectations.push(Expectation {
                kernel: kernel.to_owned(),
                instruction: instruction.to_owned(),
                count: count.parse().context("the count is a number")?,
            }),
            _ => bail!("neither `launch_bounds KERNEL THREADS BLOCKS` nor `expect KERNEL INSTRUCTION COUNT`"),
        }
        Ok(())
    }

    /// The kernels that have launch bounds.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.launch_bounds.keys().map(String::as_str)
    }

    /// The text of an entry point with its launch bounds between parameters and body.
    ///
    /// # Errors
    ///
    /// The kernel has none, or the compiler wrote some.
    pub fn with_launch_bounds(&self, kernel: &str, entry: &str) -> Result<String> {
        let bounds = self.launch_bounds.get(kernel).context("it has no launch bounds: declare them beside it, in `kernel!`")?;
        let (head, body) = entry.split_once('{').context("it has no body")?;
        ensure!(!head.contains(".maxntid") && !head.contains(".minnctapersm"), "the compiler wrote launch bounds of its own");
        let LaunchBounds { threads, blocks_per_sm } = bounds;
        Ok(format!("{}\n.maxntid {threads}, 1, 1\n.minnctapersm {blocks_per_sm}\n{{{body}", head.trim_end()))
    }

    /// Compares the instructions of an entry point with what its kernel expects.
    ///
    /// # Errors
    ///
    /// A count that differs.
    pub fn check_counts(&self, kernel: &str, entry: &str) -> Result<()> {
        for Expectation { instruction, count, .. } in self.expectations.iter().filter(|expected| expected.kernel == kernel) {
            let found = count_instructions(entry, instruction);
            ensure!(
                found == *count,
                "its source says that it has {count} {instruction}, but its PTX has {found}: the compiler copied or removed some"
            );
        }
        Ok(())
    }
}

/// How many instructions of `text` are `instruction`, or `instruction` with more modifiers.
fn count_instructions(text: &str, instruction: &str) -> usize {
    static PREDICATE: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^@!?[\w%$]+\s+").expect("a constant pattern is valid"));
    let statements = text.split(['\n', ';', '{', '}']).map(str::trim);
    statements
        .filter(|statement| {
            let after = PREDICATE.replace(statement, "");
            after.strip_prefix(instruction).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', ' ', '\t']))
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launch_bounds_go_between_parameters_and_body() {
        let declared = Declared::read("\t// packinfer.launch_bounds k 256 3\n").unwrap();
        let entry = ".visible .entry k(\n\t.param .align 8 .b8 k_param_0[72]\n)\n{\n\tret;\n}";
        assert_eq!(
            declared.with_launch_bounds("k", entry).unwrap(),
            ".visible .entry k(\n\t.param .align 8 .b8 k_param_0[72]\n)\n.maxntid 256, 1, 1\n.minnctapersm 3\n{\n\tret;\n}"
        );
        let error = declared.with_launch_bounds("other", entry).unwrap_err().to_string();
        assert!(error.contains("no launch bounds"), "{error}");
        let error = declared.with_launch_bounds("k", &entry.replace("\n{", "\n.maxntid 1, 1, 1\n{")).unwrap_err().to_string();
        assert!(error.contains("of its own"), "{error}");
    }

    #[test]
    fn wrong_declarations_are_errors() {
        for (wrong, why) in [
            ("// packinfer.launch_bounds k 256", "neither"),
            ("// packinfer.launch_bounds k many 1", "number"),
            ("// packinfer.launch_bounds k 1 1\n// packinfer.launch_bounds k 1 1", "already"),
            ("// packinfer.expect k bar.sync some", "number"),
            ("// packinfer.something k", "neither"),
        ] {
            let error = format!("{:#}", Declared::read(wrong).unwrap_err());
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }

    #[test]
    fn instructions_are_counted_by_their_name() {
        let text = "{\n\tbar.sync \t0;\n\t@%p1 bar.sync 1;\n\t{ bar.sync.aligned 2; bar.syncx 3; }\n\tmov.u32 %r1, %r2;\n\twgmma.wait_group.sync.aligned 0;\n}";
        assert_eq!(count_instructions(text, "bar.sync"), 3);
        assert_eq!(count_instructions(text, "wgmma"), 1);
        assert_eq!(count_instructions(text, "wgmma.mma_async"), 0);
        let declared = Declared::read("// packinfer.expect k bar.sync 2\n// packinfer.expect other bar.sync 9").unwrap();
        let error = declared.check_counts("k", text).unwrap_err().to_string();
        assert!(error.contains("2 bar.sync, but its PTX has 3"), "{error}");
        let declared = Declared::read("// packinfer.expect k bar.sync 3").unwrap();
        declared.check_counts("k", text).unwrap();
    }
}
