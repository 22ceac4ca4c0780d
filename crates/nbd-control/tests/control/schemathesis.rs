//! Requests made up from the OpenAPI document. What real replicas say to them is in `tests/api`.

use nbd_testkit::schemathesis;

use crate::fake::Scene;

#[test]
fn schemathesis_finds_nothing() {
    let scene = Scene::new(2, &[]);
    let arguments = ["--exclude-operation-id=watchOperation", "--max-examples=12"];
    schemathesis::run(scene.http, &[&arguments[..], &["--request-timeout=20"]].concat());
    // Operations of replicas that are made up go on for ever: a stream is looked at for so long.
    let arguments = ["--include-operation-id=watchOperation", "--max-examples=2"];
    schemathesis::run(scene.http, &[&arguments[..], &["--request-timeout=1"]].concat());
}
