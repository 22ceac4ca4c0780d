//! `nbdctl probe`: one HTTP request, for health checks where there is no curl, as in the image.

use std::io::{self, Write as _};
use std::time::Duration;

use ureq::Agent;
use ureq::http::Uri;

use crate::failure::{FAILED, Failure};

/// Time for all of it: what asks for health asks again soon, and must not pile up.
const DEADLINE: Duration = Duration::from_secs(3);

/// For `--help`.
pub(crate) const HELP: &str = "\
Examples:
  nbdctl probe http://127.0.0.1:8080/health
  nbdctl probe http://127.0.0.1:8080/readyz > /dev/null && echo ready

Exit codes: 0 it answered with a status of 2xx; 1 with another, or not within 3 seconds.";

/// Flags of `nbdctl probe`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to ask for, as http://HOST:PORT/PATH.
    #[arg(value_parser = url)]
    url: Uri,
}

fn url(text: &str) -> Result<Uri, String> {
    let url: Uri = text.parse().map_err(|error| format!("{error}"))?;
    match (url.scheme_str(), url.host()) {
        (Some("http"), Some(host)) if !host.is_empty() => Ok(url),
        _ => Err("write http://HOST:PORT/PATH".to_owned()),
    }
}

/// Prints what is answered.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        // The answer of the one asked counts, whomever it points to.
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(None)
        .user_agent(concat!("nbdctl/", env!("CARGO_PKG_VERSION")))
        .timeout_global(Some(DEADLINE))
        .build();
    let failed =
        |error: &dyn std::fmt::Display| Failure::new(FAILED, format!("{}: {error}", args.url));
    let mut answer = Agent::from(config).get(&args.url).call().map_err(|error| failed(&error))?;
    let status = answer.status();
    let mut out = io::stdout().lock();
    let mut body = answer.body_mut().as_reader();
    let mut some = [0; 8192];
    loop {
        match io::Read::read(&mut body, &mut some) {
            Ok(0) => break,
            Ok(count) => out.write_all(&some[..count])?,
            Err(error) => return Err(failed(&error)),
        }
    }
    out.flush()?;
    if status.is_success() { Ok(()) } else { Err(failed(&format_args!("status {status}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_http_addresses_are_taken() {
        for fine in ["http://127.0.0.1:8080/health", "http://[::1]:1", "http://nbd-1-1/livez?a=b"] {
            url(fine).unwrap();
        }
        for bad in ["", "localhost:8080/health", "https://a/health", "/health", "http:///x", "a b"]
        {
            assert!(url(bad).is_err(), "{bad}");
        }
    }
}
