//! Asking the control API.
//!
//! - `settings`: where it is, with which token, and how to print: flags, environment, file.
//! - `server`: the address, checked. `url`: paths and parameters below it.
//! - `client`: requests and answers; `explain`: what failed, in words and as an exit code.
//! - `events`: watching an operation.

mod client;
mod events;
mod explain;
mod server;
mod settings;
mod url;

pub(crate) use self::client::{Answer, Client, Extent};
pub(crate) use self::events::News;
pub(crate) use self::settings::{Connection, Format, Settings};
pub(crate) use self::url::Url;
