//! Schemathesis: requests made up from a server's OpenAPI document, right ones and wrong ones, and
//! answers held against it.

use std::net::SocketAddr;
use std::process::Command;

use crate::tools;

/// What answers are held against. `missing_required_header` and `ignored_auth` have nothing to look
/// at without tokens.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,\
                      response_headers_conformance,response_schema_conformance,\
                      negative_data_rejection,unsupported_method";

/// Runs schemathesis on the server at this address, with further arguments. The test is skipped if
/// there is no schemathesis.
///
/// # Panics
/// If it finds something, with what it says.
pub fn run(server: SocketAddr, arguments: &[&str]) {
    let Some(program) = tools::python_tool("schemathesis") else {
        tools::skip(file!(), "needs schemathesis: cargo xtask test installs it");
        return;
    };
    let directory = tempfile::tempdir().expect("create a directory for what it writes");
    let mut command = Command::new(program);
    command.current_dir(directory.path());
    command.args(["run", &format!("http://{server}/openapi.json"), "--seed", "1"]);
    command.args(["--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--workers", "1"]);
    command.args(["--generation-database", "none", "--no-color"]).args(arguments);
    let output = command.output().expect("run schemathesis");
    let (said, failed) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{failed}");
}
