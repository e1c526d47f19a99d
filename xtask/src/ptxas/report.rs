//! What `ptxas --verbose` prints.

use std::fmt;
use std::sync::LazyLock;

use anyhow::{Context, Result};
use regex::Regex;

/// What `ptxas` says of one kernel.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Registers of a thread.
    pub registers: u32,
    /// Static shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Local memory of a thread, in bytes.
    pub stack_bytes: u32,
    /// Bytes of registers that a thread stores to local memory.
    pub spill_store_bytes: u32,
    /// Bytes of registers that a thread loads from local memory.
    pub spill_load_bytes: u32,
    /// Warnings, and notes on lost performance.
    pub warnings: Vec<String>,
}

/// Something that a kernel on the timed path is not to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Registers are kept in local memory.
    Spills { store_bytes: u32, load_bytes: u32 },
    /// A line that `ptxas` printed.
    Warning(String),
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Spills { store_bytes, load_bytes } => {
                write!(formatter, "spills ({store_bytes} bytes stored, {load_bytes} bytes loaded)")
            }
            Self::Warning(line) => formatter.write_str(line),
        }
    }
}

impl Report {
    /// Reads what `ptxas` printed of a module with one kernel.
    ///
    /// # Errors
    ///
    /// The kernel's registers or spills are not told.
    pub fn parse(printed: &str, kernel: &str) -> Result<Self> {
        static FRAME: LazyLock<Regex> =
            LazyLock::new(|| regex(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"));
        static REGISTERS: LazyLock<Regex> = LazyLock::new(|| regex(r"Used (\d+) registers"));
        static SHARED: LazyLock<Regex> = LazyLock::new(|| regex(r"(\d+) bytes smem"));

        // Several functions may be told of; the kernel's lines follow its name.
        let title = format!("Function properties for {kernel}\n");
        let (_, own) = printed.split_once(&title).with_context(|| format!("it does not tell of {kernel}"))?;
        let [stack_bytes, spill_store_bytes, spill_load_bytes] = numbers(&FRAME, own).context("it tells no spills")?;
        let [registers] = numbers(&REGISTERS, own).context("it tells no registers")?;
        let [shared_bytes] = numbers(&SHARED, own).unwrap_or([0]);
        let warnings = printed.lines().filter(|line| is_warning(line)).map(|line| line.trim().to_owned()).collect();
        Ok(Self { registers, shared_bytes, stack_bytes, spill_store_bytes, spill_load_bytes, warnings })
    }

    /// What a kernel on the timed path is not to have.
    pub fn findings(&self) -> Vec<Finding> {
        let &Self { spill_store_bytes: store_bytes, spill_load_bytes: load_bytes, .. } = self;
        let spills = (store_bytes > 0 || load_bytes > 0).then_some(Finding::Spills { store_bytes, load_bytes });
        spills.into_iter().chain(self.warnings.iter().cloned().map(Finding::Warning)).collect()
    }
}

/// Whether a line is a warning, or one of the notes that matrix products wait for each other (C7510 to C7519).
fn is_warning(line: &str) -> bool {
    static NOTE: LazyLock<Regex> = LazyLock::new(|| regex(r"\(C75\d\d\)|Potential Performance Loss"));
    line.starts_with("ptxas warning") || NOTE.is_match(line)
}

/// The numbers in the pattern's groups.
fn numbers<const N: usize>(pattern: &Regex, text: &str) -> Option<[u32; N]> {
    let found = pattern.captures(text)?;
    let mut numbers = [0; N];
    for (group, number) in numbers.iter_mut().enumerate() {
        *number = found.get(group + 1)?.as_str().parse().ok()?;
    }
    Some(numbers)
}

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant pattern is valid")
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLEAN: &str = "ptxas info    : 0 bytes gmem\n\
        ptxas info    : Compiling entry function 'merge' for 'sm_80'\n\
        ptxas info    : Function properties for merge\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
        ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem, 424 bytes cmem[0]\n\
        ptxas info    : Compile time = 12.3 ms\n";

    #[test]
    fn a_clean_kernel_has_no_findings() {
        let report = Report::parse(CLEAN, "merge").unwrap();
        assert_eq!(report, Report { registers: 40, shared_bytes: 2048, ..Report::default() });
        assert!(report.findings().is_empty());
    }

    #[test]
    fn spills_and_warnings_are_found() {
        let printed = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
            insufficient register resources for the wgmma pipeline in the function 'attention'\n\
            ptxas warning : Registers are spilled to local memory in function 'attention', 12 bytes spill stores, 16 bytes spill loads\n\
            ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'attention' for 'sm_90a'\n\
            ptxas info    : Function properties for attention\n    16 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n\
            ptxas info    : Used 168 registers, used 5 barriers, 16 bytes cumulative stack size\n";
        let report = Report::parse(printed, "attention").unwrap();
        assert_eq!((report.registers, report.shared_bytes, report.stack_bytes), (168, 0, 16));
        let findings = report.findings();
        assert_eq!(findings[0], Finding::Spills { store_bytes: 12, load_bytes: 16 });
        assert_eq!(findings[0].to_string(), "spills (12 bytes stored, 16 bytes loaded)");
        assert!(findings[1].to_string().contains("(C7510)"));
        assert!(findings[2].to_string().starts_with("ptxas warning"));
        assert_eq!(findings.len(), 3);
    }

    #[test]
    fn another_kernel_s_report_is_an_error() {
        assert!(Report::parse(CLEAN, "attention").unwrap_err().to_string().contains("attention"));
        assert!(Report::parse(&CLEAN.replace("spill loads", ""), "merge").unwrap_err().to_string().contains("spills"));
    }
}
