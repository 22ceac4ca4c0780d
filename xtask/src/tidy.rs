//! `cargo xtask tidy`: what neither the compiler, clippy nor rustfmt checks. Each rule says why it
//! is there when it is broken.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

/// Lines of production code a file may have: what stands before its first test module.
const FILE_LINES_MAX: usize = 800;

/// Columns a line may have; rustfmt's `max_width`.
const COLUMNS_MAX: usize = 100;

/// Words that must not stay in the tree, and why. Put together here so that this file passes
/// itself.
const LEFTOVERS: [(&str, &str); 4] = [
    (concat!("todo", "!"), "an unfinished path panics in front of a user: finish it or refuse"),
    (concat!("dbg", "!"), "it prints to standard error in production: use tracing"),
    (concat!("FIX", "ME"), "nobody will: mend it now or open an issue and say what is"),
    (concat!("XX", "X"), "it marks a doubt without naming it: say what is and why"),
];

/// A broken rule.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    file: PathBuf,
    line: usize,
    message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.message)
    }
}

/// Checks every Rust file of the workspace and of `fuzz`.
///
/// # Errors
/// Broken rules, all of them; files that cannot be read.
pub(crate) fn check(root: &Path) -> anyhow::Result<()> {
    let mut findings = Vec::new();
    let mut files = 0;
    for directory in ["crates", "benches", "xtask", "fuzz"] {
        for file in rust_files(&root.join(directory))? {
            let text =
                fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
            let name = file.strip_prefix(root).unwrap_or(&file);
            findings.extend(check_file(name, &text));
            files += 1;
        }
    }
    for finding in &findings {
        println!("{finding}");
    }
    if !findings.is_empty() {
        bail!("tidy: {} findings in {files} files", findings.len());
    }
    println!("tidy: {files} files");
    Ok(())
}

/// Every `.rs` file under `directory`, sorted; none if it does not exist. Build output is left out.
pub(crate) fn rust_files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        if !directory.is_dir() {
            continue;
        }
        let list = || format!("list {}", directory.display());
        for entry in fs::read_dir(&directory).with_context(list)? {
            let path = entry.with_context(list)?.path();
            if path.is_dir() {
                if !path.ends_with("target") {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn check_file(file: &Path, text: &str) -> Vec<Finding> {
    let finding = |line, message| Finding { file: file.to_owned(), line, message };
    let mut findings = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        findings.extend(check_line(line).into_iter().map(|message| finding(number, message)));
    }
    let lines = production_lines(text);
    if lines > FILE_LINES_MAX && !is_test_file(file) {
        findings.push(finding(
            FILE_LINES_MAX + 1,
            format!(
                "{lines} lines of production code, over {FILE_LINES_MAX}: nobody holds such \
                     a file in the head; split it by what owns what"
            ),
        ));
    }
    if is_crate_root(file) && !has_crate_doc(text) {
        findings.push(finding(
            1,
            "no crate doc: start with `//!` lines that say what this is, what it refuses to know, \
             and where to start reading"
                .to_owned(),
        ));
    }
    findings
}

fn check_line(line: &str) -> Vec<String> {
    let mut messages = Vec::new();
    for (word, reason) in LEFTOVERS {
        if contains_word(line, word) {
            messages.push(format!("`{word}`: {reason}"));
        }
    }
    if line.contains('\t') {
        messages.push("a tab: it has a different width for every reader; use blanks".to_owned());
    }
    let columns = line.chars().count();
    if columns > COLUMNS_MAX && !may_be_wide(line) {
        messages.push(format!(
            "{columns} columns, over {COLUMNS_MAX}: two files no longer fit side by side"
        ));
    }
    messages
}

/// A row of a table and an address cannot be broken.
fn may_be_wide(line: &str) -> bool {
    let comment = line.trim_start().trim_start_matches(['/', '!']).trim_start();
    comment.starts_with('|') || line.contains("://")
}

/// Whether `word` stands in `line` by itself, not as part of a longer word.
fn contains_word(line: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(start, _)| {
        let before = line[..start].chars().next_back();
        let after = line[start + word.len()..].chars().next();
        let joins_after = word.ends_with(is_part) && after.is_some_and(is_part);
        !before.is_some_and(is_part) && !joins_after
    })
}

/// Lines before the first test module.
fn production_lines(text: &str) -> usize {
    text.lines().take_while(|line| line.trim() != "#[cfg(test)]").count()
}

fn is_test_file(file: &Path) -> bool {
    file.file_name().is_some_and(|name| name == "tests.rs")
        || file.components().any(|part| part.as_os_str() == "tests")
}

fn is_crate_root(file: &Path) -> bool {
    file.ends_with("src/lib.rs")
        || file.ends_with("src/main.rs")
        || file.parent().is_some_and(|parent| parent.ends_with("src/bin"))
}

fn has_crate_doc(text: &str) -> bool {
    text.starts_with("//! ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(file: &str, text: &str) -> Vec<String> {
        check_file(Path::new(file), text).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn leftovers_are_found_with_the_reason() {
        for (word, reason) in LEFTOVERS {
            let found = messages("a/src/x.rs", &format!("fn f() {{}}\n// {word} later\n"));
            assert_eq!(found, [format!("a/src/x.rs:2: `{word}`: {reason}")]);
            assert_eq!(messages("a/src/x.rs", &format!("let my_{word}s = 1;")), [""; 0]);
        }
    }

    #[test]
    fn wide_lines_and_tabs_are_found_but_not_tables_and_addresses() {
        let wide = "x".repeat(COLUMNS_MAX + 1);
        let found = messages("a/src/x.rs", &format!("let {wide} = 1;\n\tlet y = 2;\n"));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("110 columns"), "{found:?}");
        assert!(found[1].contains("a/src/x.rs:2: a tab"), "{found:?}");
        for line in [format!("//! | {wide} |"), format!("// https://x/{wide}"), "é".repeat(100)] {
            assert_eq!(messages("a/src/x.rs", &line), [""; 0]);
        }
    }

    #[test]
    fn only_production_lines_count_towards_the_size() {
        let long = "fn f() {}\n".repeat(FILE_LINES_MAX);
        assert_eq!(messages("a/src/x.rs", &format!("{long}#[cfg(test)]\n{long}")), [""; 0]);
        let longer = format!("{long}fn f() {{}}\n");
        assert!(messages("a/src/x.rs", &longer)[0].contains("801 lines of production code"));
        assert_eq!(messages("a/src/x/tests.rs", &longer), [""; 0]);
        assert_eq!(messages("a/tests/x.rs", &longer), [""; 0]);
    }

    #[test]
    fn every_crate_root_opens_with_its_doc() {
        for root in ["a/src/lib.rs", "a/src/main.rs", "a/src/bin/b.rs"] {
            assert!(messages(root, "fn main() {}\n")[0].contains("no crate doc"));
            assert_eq!(messages(root, "//! What this is.\n"), [""; 0]);
        }
        assert_eq!(messages("a/src/other.rs", "fn f() {}\n"), [""; 0]);
    }

    #[test]
    fn walks_into_folders_but_not_into_build_output() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for file in ["src/b/c.rs", "src/a.rs", "src/a.txt", "target/debug/x.rs"] {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let found = rust_files(root).unwrap();
        assert_eq!(found, [root.join("src/a.rs"), root.join("src/b/c.rs")]);
        assert!(rust_files(&root.join("absent")).unwrap().is_empty());
    }
}
