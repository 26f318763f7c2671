//! What a parser says of a value that it cannot take, for people who do not write Rust. Owns the words; decides nothing.

/// Of a document in TOML, where what has keys is a section.
pub fn plain_toml(message: &str) -> String {
    plain(message, "a section, or { key = value }")
}

/// Of one in JSON, where it is an object. What follows the message (`at line 1 column 5`) stays.
pub fn plain_json(message: &str) -> String {
    match message.split_once(" at line ") {
        Some((problem, place)) => format!("{} at line {place}", plain(problem, "an object")),
        None => plain(message, "an object"),
    }
}

fn plain(message: &str, table: &str) -> String {
    let message = message.replace('\n', ", ");
    if message == "wanted string or table" {
        return "expected a string".to_owned();
    }
    let Some((problem, expected)) = message.rsplit_once(", expected ") else { return message };
    let is_of_value = problem.starts_with("invalid type: ") || problem.starts_with("invalid value: ");
    let found = if is_of_value { given(problem) } else { problem.to_owned() };
    format!("{found}, expected {}", wanted(expected, table))
}

/// What is there.
fn given(problem: &str) -> String {
    let Some((kind, value)) = problem.split_once(": ") else { return problem.to_owned() };
    let bare = |name: &str| value.strip_prefix(name)?.strip_prefix(" `")?.strip_suffix('`');
    let number = || bare("integer").or_else(|| bare("floating point"));
    let value = match (number(), bare("boolean"), value) {
        (Some(number), _, _) => format!("number {number}"),
        (None, Some(boolean), _) => boolean.to_owned(),
        (None, None, "sequence") => "a list".to_owned(),
        (None, None, "map") => "a group of keys".to_owned(),
        (None, None, other) => other.to_owned(),
    };
    format!("{kind}: {value}")
}

/// What should be there.
fn wanted(expected: &str, table: &str) -> String {
    match expected {
        "u8" => "a whole number from 0 to 255".to_owned(),
        "u16" => "a whole number from 0 to 65535".to_owned(),
        "u32" => "a whole number from 0 to 4294967295".to_owned(),
        "u64" | "usize" => "a whole number, 0 or more".to_owned(),
        "i32" => "a whole number from -2147483648 to 2147483647".to_owned(),
        "i64" | "isize" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => table.to_owned(),
        other if other.starts_with("struct ") => table.to_owned(),
        other => other.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_word_of_rust_is_left() {
        for (rust, people) in [
            (
                "invalid type: string \"a\", expected u32",
                "invalid type: string \"a\", expected a whole number from 0 to 4294967295",
            ),
            ("invalid type: boolean `true`, expected f64", "invalid type: true, expected a number"),
            (
                "invalid value: integer `-1`, expected u64",
                "invalid value: number -1, expected a whole number, 0 or more",
            ),
            ("invalid type: floating point `1.5`, expected a sequence", "invalid type: number 1.5, expected a list"),
            ("invalid type: sequence, expected a boolean", "invalid type: a list, expected true or false"),
            (
                "invalid type: integer `3`, expected struct Replicas",
                "invalid type: number 3, expected a section, or { key = value }",
            ),
            ("wanted string or table", "expected a string"),
            ("unknown variant `a`, expected `b` or `c`", "unknown variant `a`, expected `b` or `c`"),
            ("missing field `max`", "missing field `max`"),
        ] {
            assert_eq!(plain_toml(rust), people);
        }
        let json = "invalid type: map, expected f64 at line 1 column 17";
        assert_eq!(plain_json(json), "invalid type: a group of keys, expected a number at line 1 column 17");
    }
}
