//! Paths and parameters of requests.

use std::fmt::Write as _;

/// A path of the API, with parameters. Whatever is put into it is encoded, so that a volume's name
/// may have any characters.
#[derive(Debug, Clone)]
pub(crate) struct Url {
    path: String,
    parameters: String,
}

impl Url {
    /// A path below [`nbd_api::PREFIX`] that needs no encoding: `/volumes`.
    pub(crate) fn new(path: &str) -> Self {
        Self { path: format!("{}{path}", nbd_api::PREFIX), parameters: String::new() }
    }

    /// One more step of the path.
    pub(crate) fn then(mut self, segment: impl ToString) -> Self {
        let segment = segment.to_string();
        self.path.push('/');
        match segment.as_str() {
            // Whatever is on the way must not take them for steps to the directory above.
            "." | ".." => self.path += &segment.replace('.', "%2E"),
            segment => encode(segment, &mut self.path),
        }
        self
    }

    /// A parameter more.
    pub(crate) fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.parameters.push(if self.parameters.is_empty() { '?' } else { '&' });
        self.parameters += name;
        self.parameters.push('=');
        encode(&value.to_string(), &mut self.parameters);
        self
    }

    /// The same, if there is a value.
    pub(crate) fn with_some(self, name: &str, value: Option<impl ToString>) -> Self {
        match value {
            Some(value) => self.with(name, value),
            None => self,
        }
    }

    /// As it goes into a request.
    pub(crate) fn text(&self) -> String {
        format!("{}{}", self.path, self.parameters)
    }
}

fn encode(text: &str, into: &mut String) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            into.push(byte.into());
        } else {
            let written = write!(into, "%{byte:02X}");
            debug_assert!(written.is_ok(), "a String takes everything");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_encoded() {
        let url = Url::new("/volumes").then("a/b c%").with("label", "k=v&w").with("limit", 5);
        assert_eq!(url.text(), "/api/v1/volumes/a%2Fb%20c%25?label=k%3Dv%26w&limit=5");
        assert_eq!(Url::new("/volumes").then("..").text(), "/api/v1/volumes/%2E%2E");
        let none = Url::new("/x").with_some("a", None::<u32>);
        assert_eq!(none.text(), "/api/v1/x");
        assert_eq!(Url::new("/v").then("ä").text(), "/api/v1/v/%C3%A4");
    }
}
