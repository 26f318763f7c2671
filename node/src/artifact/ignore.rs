//! `.stokeignore`: names that are not packed, a pattern a line, in the words of `.gitignore` without its exceptions. Owns the matching.

/// Patterns of one folder.
#[derive(Default, Debug)]
pub struct Ignore {
    patterns: Vec<Pattern>,
}

#[derive(Debug)]
struct Pattern {
    parts: Vec<String>,
    /// It names a place from the folder on, not a name anywhere.
    anchored: bool,
    folders_only: bool,
}

impl Ignore {
    pub fn parse(text: &str) -> Result<Self, String> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let patterns = lines.map(|line| {
            if line.starts_with('!') {
                return Err(format!("{line:?}: exceptions are not known here, name what is to be left out"));
            }
            let folders_only = line.ends_with('/');
            let path = line.trim_matches('/');
            let anchored = line.starts_with('/') || path.contains('/');
            Ok(Pattern { parts: path.split('/').map(str::to_owned).collect(), anchored, folders_only })
        });
        Ok(Self { patterns: patterns.collect::<Result<_, _>>()? })
    }

    /// Whether `path` (relative, with `/`) is left out, and with it what is below.
    pub fn covers(&self, path: &str, is_folder: bool) -> bool {
        let parts: Vec<&str> = path.split('/').collect();
        let covers = |pattern: &Pattern| {
            let own: Vec<&str> = pattern.parts.iter().map(String::as_str).collect();
            let found = match pattern.anchored {
                true => matches_path(&own, &parts),
                false => parts.last().is_some_and(|name| matches_name(own[0].as_bytes(), name.as_bytes())),
            };
            found && (is_folder || !pattern.folders_only)
        };
        path == ".git" || parts.last() == Some(&".git") || self.patterns.iter().any(covers)
    }
}

/// `**` is any number of folders.
fn matches_path(pattern: &[&str], path: &[&str]) -> bool {
    match (pattern, path) {
        ([], []) => true,
        (["**"], _) => !path.is_empty(),
        (["**", rest @ ..], _) => (0..=path.len()).any(|skip| matches_path(rest, &path[skip..])),
        ([first, rest @ ..], [name, below @ ..]) => {
            matches_name(first.as_bytes(), name.as_bytes()) && matches_path(rest, below)
        }
        ([], _) | (_, []) => false,
    }
}

/// `*` is any number of characters, `?` is one. Remembers the last `*` only: what follows it may always begin later.
fn matches_name(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut place) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while place < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at + 1, place));
                at += 1;
            }
            Some(byte) if *byte == b'?' || *byte == name[place] => (at, place) = (at + 1, place + 1),
            Some(_) | None => match &mut star {
                Some((after, from)) => {
                    *from += 1;
                    (at, place) = (*after, *from);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_cover_what_gitignore_covers() {
        let text = "# made here\n*.pyc\n__pycache__/\n/data\nruns/*/big.*\nlogs/**/old\n";
        let ignore = Ignore::parse(text).unwrap();
        for (path, is_folder) in [
            ("a.pyc", false),
            ("b/c/a.pyc", false),
            ("b/__pycache__", true),
            ("data", true),
            ("data", false),
            ("runs/1/big.bin", false),
            ("logs/old", true),
            ("logs/a/b/old", false),
            (".git", true),
            ("b/.git", true),
        ] {
            assert!(ignore.covers(path, is_folder), "{path}");
        }
        for path in ["a.py", "__pycache__", "b/data", "runs/1/2/big.bin", "runs/big.bin", "logs/older", ".gitignore"] {
            assert!(!ignore.covers(path, false), "{path}");
        }
        assert!(Ignore::parse("!a").unwrap_err().contains("exceptions"));
    }

    #[test]
    fn many_stars_take_no_time() {
        let ignore = Ignore::parse(&"*a".repeat(40)).unwrap();
        assert!(!ignore.covers(&format!("{}b", "a".repeat(5_000)), false));
    }
}
