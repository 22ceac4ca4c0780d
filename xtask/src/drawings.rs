//! Drawings that stand both in a document and in the module that they describe: one of the two is
//! bound to be forgotten, so they are compared.
//!
//! In the document a drawing is preceded by `<!-- drawn in PATH -->`, and its lines stand in the
//! module's documentation just as they are.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};

/// Documents with drawings.
const DOCUMENTS: [&str; 1] = ["docs/DATA_FILE.md"];

const MARK: &str = "<!-- drawn in ";

/// Compares every marked drawing with its module.
///
/// # Errors
/// A drawing that differs, a module without it, files that cannot be read.
pub(crate) fn check(root: &Path) -> anyhow::Result<()> {
    let mut drawings = 0;
    for document in DOCUMENTS {
        let text =
            fs::read_to_string(root.join(document)).with_context(|| format!("read {document}"))?;
        for (module, drawing) in marked(&text) {
            let source = fs::read_to_string(root.join(module))
                .with_context(|| format!("read {module}, named in {document}"))?;
            if !module_docs(&source).contains(&drawing) {
                bail!("the drawing in {document} is not the one in the docs of {module}");
            }
            drawings += 1;
        }
    }
    println!("tidy: {drawings} drawings stand in their modules");
    Ok(())
}

/// The modules named and the drawings behind their marks.
fn marked(text: &str) -> Vec<(&str, String)> {
    let mut found = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(module) = line.strip_prefix(MARK).and_then(|rest| rest.strip_suffix(" -->"))
        else {
            continue;
        };
        let drawing: Vec<_> =
            lines.by_ref().skip(1).take_while(|line| !line.starts_with("```")).collect();
        found.push((module, drawing.join("\n")));
    }
    found
}

/// The text of a module's own documentation.
fn module_docs(source: &str) -> String {
    let docs = source.lines().map_while(|line| line.strip_prefix("//!"));
    docs.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drawing_is_found_in_its_module_and_a_changed_one_is_not() {
        let document = "a\n<!-- drawn in m.rs -->\n```text\n| x |\n| y |\n```\nb\n";
        let drawings = marked(document);
        assert_eq!(drawings, [("m.rs", "| x |\n| y |".to_owned())]);
        let module = "//! Title.\n//!\n//! ```text\n//! | x |\n//! | y |\n//! ```\nfn f() {}\n";
        assert!(module_docs(module).contains(&drawings[0].1));
        assert!(!module_docs(&module.replace("y", "z")).contains(&drawings[0].1));
    }
}
