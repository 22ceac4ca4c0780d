//! Reads the byte sequences under `tests/golden/`.

/// The sequence called `name` in a golden file.
pub(crate) fn bytes(file: &str, name: &str) -> Vec<u8> {
    let mut lines = file.lines().skip_while(|line| line.strip_suffix(':') != Some(name));
    assert!(lines.next().is_some(), "no {name} in the file");
    let mut out = Vec::new();
    for token in lines.take_while(|line| !line.is_empty()).flat_map(str::split_whitespace) {
        let (byte, count) = token.split_once('*').unwrap_or((token, "1"));
        let byte = u8::from_str_radix(byte, 16).unwrap();
        out.resize(out.len() + count.parse::<usize>().unwrap(), byte);
    }
    out
}
