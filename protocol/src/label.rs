//! Names and labels: short words that one member writes and others read on their terminals. Owns what may be in them; knows nothing of what
//! they mean.

/// Linux host names have at most so many bytes; lists stay readable.
pub const NODE_NAME_BYTES_MAX: usize = 64;
/// With the two below: all labels of a node take a third of a control frame at most.
pub const LABELS_MAX: usize = 64;
const KEY_BYTES_MAX: usize = 63;
const VALUE_BYTES_MAX: usize = 255;

/// What a node is called: printable, so that it cannot write to the terminal of whoever lists it.
pub fn check_node_name(name: &str) -> Result<(), String> {
    if (1..=NODE_NAME_BYTES_MAX).contains(&name.len()) && is_plain(name) {
        return Ok(());
    }
    Err(format!("node name {}: use 1 to {NODE_NAME_BYTES_MAX} bytes without control characters", shown(name)))
}

/// Labels of a node, or those that a job asks for.
pub fn check_labels<'a>(labels: impl ExactSizeIterator<Item = (&'a str, &'a str)>) -> Result<(), String> {
    if labels.len() > LABELS_MAX {
        return Err(format!("{} labels: use at most {LABELS_MAX}", labels.len()));
    }
    for (key, value) in labels {
        check_label(key, value)?;
    }
    Ok(())
}

pub fn check_label(key: &str, value: &str) -> Result<(), String> {
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
    if !(1..=KEY_BYTES_MAX).contains(&key.len()) || !key.bytes().all(letters) {
        return Err(format!("label {}: a key has 1 to {KEY_BYTES_MAX} letters, digits and any of . _ - /", shown(key)));
    }
    if value.len() > VALUE_BYTES_MAX || !is_plain(value) {
        let value = shown(value);
        return Err(format!(
            "label {key}={value}: a value has up to {VALUE_BYTES_MAX} bytes without control characters"
        ));
    }
    Ok(())
}

/// Nothing that moves a cursor, ends a line or changes the direction of writing.
pub fn is_plain(text: &str) -> bool {
    let directs = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().all(|c| !c.is_control() && !matches!(c, '\u{2028}' | '\u{2029}') && !directs(c))
}

/// Escaped, and not longer than a line.
fn shown(text: &str) -> String {
    let start: String = text.chars().take(40).collect();
    let more = if start.len() < text.len() { "..." } else { "" };
    format!("\"{}{more}\"", start.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_short_and_write_nothing_but_themselves() {
        for name in ["gpu1.example.org", "rack 7", "größe_1", &"n".repeat(64)] {
            assert_eq!(check_node_name(name), Ok(()));
        }
        for name in ["", &"n".repeat(65), "a\nb", "\u{1b}[2J", "a\u{202e}b", "\u{9b}31m"] {
            let refused = check_node_name(name).unwrap_err();
            assert!(is_plain(&refused) && refused.len() < 200, "{refused}");
        }
        assert_eq!(check_label("zone", "a b"), Ok(()));
        assert_eq!(check_label("example.org/disk", ""), Ok(()));
        for (key, value) in [("", "a"), ("a b", "c"), ("zone", "a\tb"), ("big", &"x".repeat(60_000))] {
            assert!(check_label(key, value).unwrap_err().len() < 200);
        }
        let many: Vec<String> = (0..65).map(|number| number.to_string()).collect();
        assert!(check_labels(many.iter().map(|key| (key.as_str(), ""))).is_err());
        assert_eq!(check_labels(many[..64].iter().map(|key| (key.as_str(), ""))), Ok(()));
    }
}
