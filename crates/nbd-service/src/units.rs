//! Sizes and durations as people write them: a whole number and a unit.
//!
//! Only exact values are accepted (`1536MiB`, not `1.5GiB`), so that what the operator wrote is
//! what runs. Both types print in the form they parse.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{Deserializer, Error as _, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// A number of bytes. Written `4096`, `64KiB`, `1GiB` (powers of 1024: KiB, MiB, GiB, TiB, PiB) or
/// `64KB`, `1GB` (powers of 1000: KB, MB, GB, TB, PB); a blank before the unit is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(u64);

/// A length of time. Written `250ms`, `5s`, `2m`, `1h` (units ns, us, ms, s, m, h); only `0` needs
/// no unit. At most `u64::MAX` nanoseconds, which is 584 years.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HumanDuration(Duration);

/// Why a text is not a size or a duration. `text` is what was given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {}: {reason}; write {}", kind.noun(), kind.example())]
pub struct UnitError {
    text: String,
    kind: Kind,
    reason: Reason,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Size,
    Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Reason {
    #[error("it does not start with a whole number")]
    NoNumber,
    #[error("fractions are not accepted")]
    Fraction,
    #[error("its unit is unknown")]
    UnknownUnit,
    #[error("it has no unit")]
    NoUnit,
    #[error("it does not fit 64 bits")]
    TooLarge,
}

impl Kind {
    const fn noun(self) -> &'static str {
        match self {
            Self::Size => "size",
            Self::Duration => "duration",
        }
    }

    const fn example(self) -> &'static str {
        match self {
            Self::Size => "bytes as in 4096, 64KiB, 64MiB, 1GiB, or 1000-based as in 64MB",
            Self::Duration => "a whole number and a unit as in 250ms, 5s, 2m, 1h",
        }
    }
}

/// Unit names and their values, in the order of preference for printing (largest first).
type Units = &'static [(&'static str, u64)];

const BINARY: Units = &[
    ("PiB", 1 << 50),
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];

const DECIMAL: Units = &[
    ("PB", 1_000_000_000_000_000),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("kB", 1_000),
];

const NANOSECONDS: Units = &[
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// Splits `text` into its number and its unit (which may be empty).
fn split(text: &str) -> Result<(u64, &str), Reason> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, rest) = text.split_at(digits);
    if number.is_empty() {
        return Err(Reason::NoNumber);
    }
    if rest.starts_with(['.', ',']) {
        return Err(Reason::Fraction);
    }
    let number = number.parse().map_err(|_| Reason::TooLarge)?;
    Ok((number, rest.trim_start()))
}

fn scale(number: u64, unit: &str, tables: &[Units]) -> Result<u64, Reason> {
    let known = tables.iter().flat_map(|table| table.iter());
    let (_, value) = known.clone().find(|(name, _)| *name == unit).ok_or(Reason::UnknownUnit)?;
    number.checked_mul(*value).ok_or(Reason::TooLarge)
}

/// Writes `number` in the largest unit that divides it, so that no digit is lost.
fn write_exact(f: &mut fmt::Formatter<'_>, number: u64, units: Units) -> fmt::Result {
    let (name, value) = units
        .iter()
        .find(|(_, value)| number != 0 && number.is_multiple_of(*value))
        .copied()
        .unwrap_or(("", 1));
    f.pad(&format!("{}{name}", number / value))
}

impl ByteSize {
    /// This many bytes.
    #[must_use]
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The number of bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let parse = || match split(text)? {
            (number, "") => Ok(number),
            (number, unit) => scale(number, unit, &[BINARY, DECIMAL]),
        };
        parse().map(Self).map_err(|reason| UnitError {
            text: text.to_owned(),
            kind: Kind::Size,
            reason,
        })
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_exact(f, self.0, BINARY)
    }
}

impl HumanDuration {
    /// This length of time.
    #[must_use]
    pub const fn new(duration: Duration) -> Self {
        Self(duration)
    }

    /// The length of time.
    #[must_use]
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl From<Duration> for HumanDuration {
    fn from(duration: Duration) -> Self {
        Self(duration)
    }
}

impl FromStr for HumanDuration {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let parse = || match split(text)? {
            (0, "") => Ok(0),
            (_, "") => Err(Reason::NoUnit),
            (number, unit) => scale(number, unit, &[NANOSECONDS]),
        };
        let nanoseconds = parse().map_err(|reason| UnitError {
            text: text.to_owned(),
            kind: Kind::Duration,
            reason,
        })?;
        Ok(Self(Duration::from_nanos(nanoseconds)))
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Past 584 years only a value built in code can be; its nanoseconds are of no interest.
        let nanoseconds = u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX);
        write_exact(f, nanoseconds, NANOSECONDS)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for HumanDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    /// From a text with a unit, or from a plain number of bytes.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ByteSizeVisitor)
    }
}

struct ByteSizeVisitor;

impl Visitor<'_> for ByteSizeVisitor {
    type Value = ByteSize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size such as \"64MiB\", or a number of bytes")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ByteSize, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
        Ok(ByteSize(bytes))
    }

    fn visit_i64<E: serde::de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
        u64::try_from(bytes).map(ByteSize).map_err(|_| {
            E::invalid_value(serde::de::Unexpected::Signed(bytes), &"a size of 0 bytes or more")
        })
    }
}

impl<'de> Deserialize<'de> for HumanDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(text: &str) -> Result<u64, Reason> {
        text.parse::<ByteSize>().map(ByteSize::bytes).map_err(|error| error.reason)
    }

    fn duration(text: &str) -> Result<Duration, Reason> {
        text.parse::<HumanDuration>().map(HumanDuration::get).map_err(|error| error.reason)
    }

    #[test]
    fn sizes_parse_exactly() {
        assert_eq!(size("0"), Ok(0));
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("512B"), Ok(512));
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("1 GiB"), Ok(1 << 30));
        assert_eq!(size("2TiB"), Ok(2 << 40));
        assert_eq!(size("3PiB"), Ok(3 << 50));
        assert_eq!(size("5KB"), Ok(5_000));
        assert_eq!(size("5kB"), Ok(5_000));
        assert_eq!(size("7TB"), Ok(7_000_000_000_000));
        assert_eq!(size("18446744073709551615"), Ok(u64::MAX));
    }

    #[test]
    fn sizes_are_refused_with_the_reason() {
        for (text, reason) in [
            ("", Reason::NoNumber),
            ("GiB", Reason::NoNumber),
            ("-1", Reason::NoNumber),
            ("+1", Reason::NoNumber),
            ("1.5TiB", Reason::Fraction),
            ("1,5TiB", Reason::Fraction),
            ("1gib", Reason::UnknownUnit),
            ("1G", Reason::UnknownUnit),
            ("1Gb", Reason::UnknownUnit),
            ("1 GiB x", Reason::UnknownUnit),
            ("18446744073709551616", Reason::TooLarge),
            ("16384PiB", Reason::TooLarge),
        ] {
            assert_eq!(size(text), Err(reason), "{text:?}");
        }
    }

    #[test]
    fn an_error_names_the_value_and_what_is_allowed() {
        let message = "1.5TiB".parse::<ByteSize>().unwrap_err().to_string();
        assert!(message.starts_with("\"1.5TiB\" is not a size: fractions"), "{message}");
        assert!(message.contains("64MiB"), "{message}");
        let message = "5".parse::<HumanDuration>().unwrap_err().to_string();
        assert!(message.starts_with("\"5\" is not a duration: it has no unit"), "{message}");
    }

    #[test]
    fn durations_parse_exactly() {
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("2 m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("1h"), Ok(Duration::from_secs(3600)));
        assert_eq!(duration("20us"), Ok(Duration::from_micros(20)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert_eq!(duration("5"), Err(Reason::NoUnit));
        assert_eq!(duration("5min"), Err(Reason::UnknownUnit));
        assert_eq!(duration("0.5s"), Err(Reason::Fraction));
        assert_eq!(duration("9999999999h"), Err(Reason::TooLarge));
    }

    #[test]
    fn both_print_as_they_parse() {
        for text in ["0", "1B", "1000B", "4KiB", "1536MiB", "1GiB", "16383PiB"] {
            assert_eq!(text.parse::<ByteSize>().unwrap().to_string(), text);
        }
        for text in ["0", "7ns", "20us", "250ms", "1500ms", "90s", "2m", "1h"] {
            assert_eq!(text.parse::<HumanDuration>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn both_go_through_serde() {
        #[derive(Deserialize, Serialize)]
        struct Settings {
            size: ByteSize,
            wait: HumanDuration,
        }
        let settings: Settings = toml::from_str("size = 4096\nwait = \"5s\"").unwrap();
        assert_eq!(toml::to_string(&settings).unwrap(), "size = \"4KiB\"\nwait = \"5s\"\n");
        assert!(toml::from_str::<Settings>("size = -1\nwait = \"5s\"").is_err());
        assert!(toml::from_str::<Settings>("size = \"1GiB\"\nwait = 5").is_err());
    }
}
