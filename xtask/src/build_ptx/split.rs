//! From the PTX of the whole crate to one module for each kernel.
//!
//! A compiler backend emits one text with all kernels. Here it is cut into its items ([`Item`]), and each kernel is put together
//! again with the header, the variables that it uses and its launch bounds. Comments go, so that the text depends on the code
//! alone; what the kernels say in comments that begin with `packinfer.` is read first ([`Declared`]).

use std::collections::BTreeMap;
use std::sync::LazyLock;

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;

use super::declared::Declared;

/// The PTX of one kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// The kernel's name.
    pub kernel: String,
    /// A whole module, with this one entry point.
    pub ptx: String,
}

/// A statement at module scope.
#[derive(Debug, PartialEq, Eq)]
enum Item<'a> {
    /// `.version`, `.target` or `.address_size`.
    Header(&'a str),
    /// A variable.
    Variable { name: &'a str, text: &'a str },
    /// A function that kernels call, or its declaration.
    Function { name: &'a str },
    /// A kernel.
    Entry { name: &'a str, text: &'a str },
}

/// Cuts the PTX of a crate into one module for each kernel, in the order of their names.
///
/// # Errors
///
/// A kernel without launch bounds, one that calls a function, one whose instructions are not as many as it says, and text that is
/// not understood.
pub fn split(text: &str) -> Result<Vec<Module>> {
    let declared = Declared::read(text)?;
    let code = with_own_labels(&without_comments(text));
    let items = statements(&code)?.into_iter().map(Item::parse).collect::<Result<Vec<_>>>()?;

    let mut modules = BTreeMap::new();
    for item in &items {
        if let Item::Entry { name, text } = *item {
            let ptx = module(name, text, &items, &declared).with_context(|| format!("kernel {name}"))?;
            modules.insert(name, Module { kernel: name.to_owned(), ptx });
        }
    }
    ensure!(!modules.is_empty(), "the compiler emitted no kernel");
    if let Some(name) = declared.kernels().find(|name| !modules.contains_key(name)) {
        bail!("launch bounds are declared for {name}, which is no kernel");
    }
    Ok(modules.into_values().collect())
}

fn module(kernel: &str, entry: &str, items: &[Item], declared: &Declared) -> Result<String> {
    let mut variables = Vec::new();
    let mut texts_to_search = vec![entry];
    while let Some(text) = texts_to_search.pop() {
        for item in items {
            match *item {
                Item::Variable { name, text: variable } if mentions(text, name) && !variables.contains(&variable) => {
                    variables.push(variable);
                    if variable != text {
                        texts_to_search.push(variable);
                    }
                }
                Item::Function { name } if mentions(text, name) => bail!(
                    "it calls {name}: kernels are one function each. What they call is to be #[inline(always)], and nothing may panic \
                     (integer division, indexing by a variable)"
                ),
                _ => {}
            }
        }
    }
    // Variables stand in the order in which the compiler emitted them.
    variables
        .sort_by_key(|variable| items.iter().position(|item| matches!(item, Item::Variable { text, .. } if text == variable)));

    declared.check_counts(kernel, entry)?;
    let header: Vec<&str> =
        items.iter().filter_map(|item| if let Item::Header(text) = item { Some(*text) } else { None }).collect();
    let entry = declared.with_launch_bounds(kernel, entry)?;
    let mut ptx = header.join("\n") + "\n\n";
    for variable in variables {
        ptx += variable;
        ptx += "\n\n";
    }
    ptx += &entry;
    ptx.push('\n');
    Ok(ptx)
}

impl<'a> Item<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        static FUNCTION: LazyLock<Regex> = LazyLock::new(|| regex(r"\.(entry|func)\s+(?:\([^)]*\)\s*)?([\w$%]+)"));
        static VARIABLE: LazyLock<Regex> = LazyLock::new(|| {
            regex(r"^\s*(?:\.(?:extern|visible|weak|common)\s+)?\.(?:shared|global|const)\s[^=;\[]*?([\w$%]+)\s*[\[=;]")
        });
        if is_header(text) {
            return Ok(Self::Header(text));
        }
        let head = text.split('{').next().unwrap_or(text);
        if let Some(found) = FUNCTION.captures(head) {
            let name = found.get(2).expect("the pattern has two groups").as_str();
            return Ok(if &found[1] == "entry" { Self::Entry { name, text } } else { Self::Function { name } });
        }
        if let Some(found) = VARIABLE.captures(text) {
            return Ok(Self::Variable { name: found.get(1).expect("the pattern has a group").as_str(), text });
        }
        bail!("the compiler emitted a statement that is not understood: {}", head.lines().next().unwrap_or(head))
    }
}

fn is_header(text: &str) -> bool {
    [".version", ".target", ".address_size"].iter().any(|directive| text.starts_with(directive))
}

/// The statements at module scope: a line for a header directive, up to `;` for a declaration, up to `}` for a function.
fn statements(code: &str) -> Result<Vec<&str>> {
    let mut statements = Vec::new();
    let mut rest = code.trim_start();
    while !rest.is_empty() {
        let end = if is_header(rest) {
            rest.find('\n').unwrap_or(rest.len())
        } else {
            statement_end(rest).with_context(|| format!("this statement has no end: {}", rest.lines().next().unwrap_or(rest)))?
        };
        let (statement, after) = rest.split_at(end);
        statements.push(statement.trim_end());
        rest = after.trim_start();
    }
    Ok(statements)
}

fn statement_end(text: &str) -> Option<usize> {
    let mut depth = 0usize;
    for (position, character) in text.char_indices() {
        match character {
            '(' | '{' | '[' => depth += 1,
            ')' | ']' => depth = depth.checked_sub(1)?,
            '}' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 && !is_initialised(text) {
                    return Some(position + 1);
                }
            }
            ';' if depth == 0 => return Some(position + 1),
            _ => {}
        }
    }
    None
}

/// Whether the first brace of a statement begins a variable's value, not a function's body.
fn is_initialised(statement: &str) -> bool {
    statement.split('{').next().is_some_and(|head| head.contains('='))
}

/// Whether `text` has `name` as a whole word.
fn mentions(text: &str, name: &str) -> bool {
    let is_word = |character: char| character.is_alphanumeric() || matches!(character, '_' | '$' | '%');
    text.match_indices(name)
        .any(|(position, _)| !text[..position].ends_with(is_word) && !text[position + name.len()..].starts_with(is_word))
}

/// The text without comments, blank lines and white space at line ends.
fn without_comments(text: &str) -> String {
    static BLOCK_COMMENT: LazyLock<Regex> = LazyLock::new(|| regex(r"(?s)/\*.*?\*/"));
    let text = BLOCK_COMMENT.replace_all(text, " ");
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default().trim_end());
    lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n")
}

/// The text with labels that do not count the functions before theirs, so that a kernel's PTX does not depend on the others.
fn with_own_labels(text: &str) -> String {
    static LABEL: LazyLock<Regex> = LazyLock::new(|| regex(r"\$L__BB\d+_"));
    LABEL.replace_all(text, "$$L__BB_").into_owned()
}

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant pattern is valid")
}

#[cfg(test)]
mod tests {
    use super::*;

    const CRATE: &str = "//\n// Generated by LLVM NVPTX Back-End\n//\n\n.version 7.1\n.target sm_80\n.address_size 64\n\n\
        // packinfer.launch_bounds twice 128 2\n// packinfer.launch_bounds copy 64 1\n// packinfer.expect copy bar.sync 1\n\
        .extern .shared .align 1024 .b8 dynamic_shared[];\n\
        .global .align 4 .b8 table[8] = {1, 2, 3, 4, 5, 6, 7, 8};\n.global .align 8 .u64 address = table;\n\n\
        .visible .func unused(\n\t.param .b64 unused_param_0\n)\n.noreturn\n{\n\ttrap;\n}\n\
        \t// .globl\ttwice\n.visible .entry twice(\n\t.param .u64 twice_param_0,\n\t.param .u32 twice_param_1\n)\n{\n\
        \t.reg .b64 %rd<3>;\n\n\t// begin inline asm\n\t{ .reg .pred p; mov.u64 %rd1, address; } // kept\n\t// end inline asm\n\tret;\n}\n\
        \t// .globl\tcopy\n.visible .entry copy()\n{\n\tmov.u32 %r1, dynamic_shared;\n\tbar.sync \t0;\n\tret;\n}\n";

    #[test]
    fn a_module_has_the_header_its_variables_and_its_entry() {
        let modules = split(CRATE).unwrap();
        let names: Vec<_> = modules.iter().map(|module| module.kernel.as_str()).collect();
        assert_eq!(names, ["copy", "twice"]);
        assert_eq!(
            modules[0].ptx,
            ".version 7.1\n.target sm_80\n.address_size 64\n\n.extern .shared .align 1024 .b8 dynamic_shared[];\n\n\
             .visible .entry copy()\n.maxntid 64, 1, 1\n.minnctapersm 1\n{\n\tmov.u32 %r1, dynamic_shared;\n\tbar.sync \t0;\n\tret;\n}\n"
        );
        let twice = &modules[1].ptx;
        assert!(twice.contains("table[8] = {1, 2, 3, 4, 5, 6, 7, 8};\n\n.global .align 8 .u64 address = table;\n\n"), "{twice}");
        assert!(
            twice.contains("twice_param_1\n)\n.maxntid 128, 1, 1\n.minnctapersm 2\n{\n\t.reg .b64 %rd<3>;\n\t{ .reg"),
            "{twice}"
        );
        assert!(!twice.contains("dynamic_shared") && !twice.contains("unused") && !twice.contains("//"), "{twice}");
    }

    #[test]
    fn a_call_is_an_error_that_names_the_function() {
        let text = CRATE.replace("bar.sync \t0;", "bar.sync \t0;\n\tcall.uni unused, (param0);");
        let error = format!("{:#}", split(&text).unwrap_err());
        assert!(error.starts_with("kernel copy: it calls unused: "), "{error}");

        let text =
            CRATE.replace(".visible .entry copy", ".extern .func (.param .b32 r) panic(.param .b64 a);\n.visible .entry copy");
        split(&text).expect("a declaration that is not used does not matter");
        let error = format!("{:#}", split(&text.replace("\tret;\n", "\tcall.uni (r), panic, (a);\n\tret;\n")).unwrap_err());
        assert!(error.contains("it calls panic"), "{error}");
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        assert!(split("").unwrap_err().to_string().contains("no kernel"));
        let error = format!("{:#}", split(".version 7.1\n.visible .entry copy(").unwrap_err());
        assert!(error.contains("has no end: .visible .entry copy("), "{error}");
        let error = format!("{:#}", split(&CRATE.replace(".global .align 4", ".tex .align 4")).unwrap_err());
        assert!(error.contains("not understood: .tex .align 4 .b8 table"), "{error}");
        let error = format!("{:#}", split(&CRATE.replace("bounds copy", "bounds cpoy")).unwrap_err());
        assert!(error.contains("copy"), "{error}");
    }

    #[test]
    fn labels_do_not_count_functions() {
        assert_eq!(with_own_labels("$L__BB12_3:\n\t@%p1 bra $L__BB12_34;"), "$L__BB_3:\n\t@%p1 bra $L__BB_34;");
    }

    #[test]
    fn a_name_is_mentioned_as_a_whole_word() {
        assert!(mentions("mov.u64 %rd1, table;", "table"));
        assert!(mentions("[table+4]", "table"));
        assert!(!mentions("mov.u64 %rd1, table_of_others;", "table"));
        assert!(!mentions("mov.u64 %rd1, $table;", "table"));
    }
}
