//! Sizes, ages, rates and names, as people read them.

use nbd_api::Timestamp;
use nbd_service::ByteSize;

/// Digits of an exact size that are still easy to read.
const EXACT_DIGITS_MAX: usize = 5;

const UNITS: [(&str, u64); 5] =
    [("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// A size that somebody chose: exact, so that it can be given to a command again, unless that has
/// too many digits.
pub(crate) fn size(bytes: u64) -> String {
    let exact = ByteSize::new(bytes).to_string();
    let digits = exact.bytes().take_while(u8::is_ascii_digit).count();
    if digits <= EXACT_DIGITS_MAX { exact } else { amount(bytes) }
}

/// A number of bytes that came about, with one digit behind the point.
pub(crate) fn amount(bytes: u64) -> String {
    if bytes == 0 {
        return "0".to_owned();
    }
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    scaled(bytes as f64)
}

fn scaled(bytes: f64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "powers of two are exact")]
    // What is rounded up to 1024.0 is 1 of the next unit.
    let unit = UNITS.iter().find(|(_, value)| bytes >= *value as f64 * (1.0 - 0.05 / 1024.0));
    match unit {
        None => format!("{bytes:.0}B"),
        Some((name, value)) => {
            #[expect(clippy::cast_precision_loss, reason = "powers of two are exact")]
            let count = format!("{:.1}", bytes / *value as f64);
            format!("{}{name}", count.strip_suffix(".0").unwrap_or(&count))
        }
    }
}

/// Bytes a second.
pub(crate) fn bandwidth(bytes: f64) -> String {
    if bytes < 0.5 { "0".to_owned() } else { format!("{}/s", scaled(bytes)) }
}

/// So many times a second.
pub(crate) fn frequency(times: f64) -> String {
    match times {
        0.0 => "0".to_owned(),
        times if times < 9.95 => format!("{times:.1}"),
        times if times < 99_999.5 => format!("{times:.0}"),
        times if times < 9_999_500.0 => format!("{:.0}k", times / 1e3),
        times => format!("{:.0}M", times / 1e6),
    }
}

/// Microseconds that something takes.
pub(crate) fn latency(us: f64) -> String {
    match us {
        us if us < 999.5 => format!("{us:.0}us"),
        us if us < 9_995.0 => format!("{:.2}ms", us / 1e3),
        us if us < 99_950.0 => format!("{:.1}ms", us / 1e3),
        us if us < 999_500.0 => format!("{:.0}ms", us / 1e3),
        us => format!("{:.1}s", us / 1e6),
    }
}

/// Time since a moment, in its largest unit. Clocks differ: what is yet to come is now.
pub(crate) fn age(now: Timestamp, then: Timestamp) -> String {
    seconds(u64::try_from(now.duration_since(then).as_secs()).unwrap_or(0))
}

/// A length of time, in its largest unit.
pub(crate) fn seconds(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3600),
        172_800..63_072_000 => format!("{}d", seconds / 86_400),
        _ => format!("{}y", seconds / 31_536_000),
    }
}

/// A moment and how long ago that is.
pub(crate) fn moment(now: Timestamp, then: Option<Timestamp>) -> String {
    match then {
        // Fractions of a second are of no interest to people.
        Some(then) => {
            let whole = Timestamp::from_second(then.as_second()).unwrap_or(then);
            format!("{whole} ({} ago)", age(now, then))
        }
        None => "not known".to_owned(),
    }
}

/// A text that somebody else has chosen, without what a terminal would obey, or would hide.
pub(crate) fn visible(text: &str) -> String {
    let mut visible = String::with_capacity(text.len());
    for c in text.chars() {
        // Control characters, and those that turn the direction of a line or have no width.
        let hidden = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{ad}');
        if c.is_control() || hidden {
            visible.extend(c.escape_default());
        } else {
            visible.push(c);
        }
    }
    visible
}

/// A name, in quotes if it could be taken for something else.
pub(crate) fn name(name: &str) -> String {
    let shown = visible(name);
    let plain = !shown.is_empty() && !shown.contains(char::is_whitespace) && shown == name;
    if plain { shown } else { format!("\"{shown}\"") }
}

/// A number of things.
pub(crate) fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_sizes_can_be_given_again() {
        for text in ["0", "512B", "4KiB", "1536MiB", "10GiB", "64TiB"] {
            let bytes = text.parse::<ByteSize>().unwrap().bytes();
            assert_eq!(size(bytes), text);
        }
        assert_eq!(size(1_000_000_000), "953.7MiB");
    }

    #[test]
    fn amounts_have_four_digits_at_most() {
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023B"),
            (1024, "1KiB"),
            (65_536 * 25, "1.6MiB"),
            ((1 << 30) - 1, "1GiB"),
            (1000 << 20, "1000MiB"),
            (u64::MAX, "16384PiB"),
        ] {
            assert_eq!(amount(bytes), text);
        }
    }

    #[test]
    fn rates_are_short() {
        assert_eq!(bandwidth(0.0), "0");
        assert_eq!(bandwidth(1.5 * 1024.0 * 1024.0), "1.5MiB/s");
        for (times, text) in
            [(0.0, "0"), (0.26, "0.3"), (9.96, "10"), (20_600.4, "20600"), (123_456.0, "123k")]
        {
            assert_eq!(frequency(times), text);
        }
        for (us, text) in
            [(0.4, "0us"), (999.6, "1.00ms"), (12_340.0, "12.3ms"), (2_500_000.0, "2.5s")]
        {
            assert_eq!(latency(us), text);
        }
    }

    #[test]
    fn ages_have_one_unit() {
        for (length, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (7_199, "119m"),
            (7_200, "2h"),
            (172_800, "2d"),
            (63_072_000, "2y"),
        ] {
            assert_eq!(seconds(length), text);
        }
        let then: Timestamp = "2026-01-31T12:00:00.25Z".parse().unwrap();
        let now: Timestamp = "2026-01-31T12:00:05Z".parse().unwrap();
        assert_eq!(moment(now, Some(then)), "2026-01-31T12:00:00Z (4s ago)");
        assert_eq!(age(then, now), "0s");
    }

    #[test]
    fn names_cannot_steer_the_terminal() {
        assert_eq!(name("vol/1.a"), "vol/1.a");
        assert_eq!(name("größe"), "größe");
        assert_eq!(name(""), "\"\"");
        assert_eq!(name("a b"), "\"a b\"");
        assert_eq!(name("a\x1b[2J\n"), r#""a\u{1b}[2J\n""#);
        assert_eq!(name("a\u{202e}b"), r#""a\u{202e}b""#);
    }
}
