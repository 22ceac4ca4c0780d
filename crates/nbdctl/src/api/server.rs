//! The address of a control API.

use std::fmt;
use std::str::FromStr;

/// Where a control API is: `http://host:port`, with a path in front of the API's if a proxy adds
/// one. Written without `http://` it means the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Server(String);

impl Server {
    /// Where `nbdctl up` runs it.
    pub(crate) fn default_address() -> Self {
        Self("http://127.0.0.1:8090".to_owned())
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse =
            |reason: &str| Err(format!("{text:?} is not the address of a server: {reason}"));
        let rest = match text.split_once("://") {
            None => text,
            Some(("http", rest)) => rest,
            Some(("https", _)) => {
                return refuse(
                    "https is not built in; use http over a tunnel (ssh -L), or through a proxy \
                     on this machine that speaks TLS",
                );
            }
            Some(_) => return refuse("write http://HOST:PORT"),
        };
        if rest.contains('@') {
            return refuse("a name and password in it are of no use; give a token");
        }
        let rest = rest.trim_end_matches('/');
        let plain = |c: char| c.is_ascii_graphic() && !"?#\\\"<>^`{|}".contains(c);
        if rest.is_empty() || rest.starts_with(['/', ':']) || !rest.chars().all(plain) {
            return refuse("write http://HOST:PORT");
        }
        let url = format!("http://{rest}");
        let parsed = match url.parse::<ureq::http::Uri>() {
            Ok(parsed) => parsed,
            Err(error) => return refuse(&error.to_string()),
        };
        // The parser takes any digits for a port.
        let has_port = |authority: &ureq::http::uri::Authority| {
            authority.as_str().len() == authority.host().len()
                || authority.port_u16().is_some_and(|port| port != 0)
        };
        if parsed.authority().is_none_or(|authority| !has_port(authority)) {
            return refuse("its port is none: 1 to 65535 are");
        }
        Ok(Self(url))
    }
}

impl<'de> serde::Deserialize<'de> for Server {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_in_one_form() {
        for text in ["http://[::1]:8090/", "http://[::1]:8090", "[::1]:8090"] {
            assert_eq!(text.parse::<Server>().unwrap().to_string(), "http://[::1]:8090");
        }
        let below = "http://console.example/nbd".parse::<Server>().unwrap();
        assert_eq!(below.to_string(), "http://console.example/nbd");
    }

    #[test]
    fn what_cannot_be_asked_is_refused_with_the_reason() {
        for (text, reason) in [
            ("https://x", "https is not built in"),
            ("ftp://x", "http://HOST:PORT"),
            ("", "http://HOST:PORT"),
            ("http://", "http://HOST:PORT"),
            ("http://:80", "http://HOST:PORT"),
            ("http://a b", "http://HOST:PORT"),
            ("http://a/?x=1", "http://HOST:PORT"),
            ("http://me:secret@a", "give a token"),
            ("http://a:99999999", "not the address"),
        ] {
            let error = text.parse::<Server>().unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
