//! Who may ask. Owns the comparison of bearer tokens; keeps hashes, never the tokens.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;

use super::error::{Kind, Problem};

/// A token that can be guessed is none.
const TOKEN_BYTES_MIN: usize = 16;

/// A secret that lets a user in.
#[derive(Clone)]
pub struct Token {
    /// For logs.
    pub user: String,
    hash: blake3::Hash,
}

impl Token {
    /// Of the secret itself.
    pub fn new(user: impl Into<String>, secret: &str) -> Self {
        Self { user: user.into(), hash: blake3::hash(secret.as_bytes()) }
    }

    /// Of the secret's BLAKE3 hash, as it may stand in a file.
    pub fn of_hash(user: impl Into<String>, hash: [u8; 32]) -> Self {
        Self { user: user.into(), hash: hash.into() }
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Token({})", self.user)
    }
}

/// From a file with a line `USER TOKEN` for each; empty lines and those that begin with `#` are passed over. The error names the line, never a token.
pub(super) fn read_tokens(file: &Path) -> Result<Vec<Token>, String> {
    let name = file.display();
    let read = |error: std::io::Error| format!("read the gateway's tokens from {name}: {error}");
    if std::fs::metadata(file).map_err(read)?.mode() & 0o077 != 0 {
        return Err(format!("{name} can be read by others: `chmod 600 {name}`"));
    }
    let text = std::fs::read_to_string(file).map_err(read)?;
    let mut tokens: Vec<Token> = Vec::new();
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    for (number, line) in lines {
        let parts: Vec<&str> = line.split_whitespace().collect();
        let [user, secret] = parts[..] else {
            return Err(format!("{name}:{number}: write a user's name and a token, with a space between"));
        };
        if secret.len() < TOKEN_BYTES_MIN {
            return Err(format!(
                "{name}:{number}: the token of {user} is too short: use at least {TOKEN_BYTES_MIN} characters"
            ));
        }
        tokens.push(Token::new(user, secret));
    }
    match tokens.is_empty() {
        true => Err(format!("{name} has no token: write a line USER TOKEN for each user")),
        false => Ok(tokens),
    }
}

/// The user whose token a request has; none where no tokens are asked for.
pub(super) fn user<'a>(tokens: &'a [Token], headers: &HeaderMap) -> Result<Option<&'a str>, Problem> {
    if tokens.is_empty() {
        return Ok(None);
    }
    let unauthorized = |message: &str| Problem::new(Kind::Unauthorized, message);
    let header =
        headers.get(AUTHORIZATION).ok_or_else(|| unauthorized("send a token: \"Authorization: Bearer ...\""))?;
    let secret = header.as_bytes().split_at_checked(7).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
    let (_, secret) = secret.ok_or_else(|| unauthorized("send the token as \"Authorization: Bearer ...\""))?;
    let hash = blake3::hash(secret.trim_ascii());
    // Hashes are compared in constant time, all of them: the time tells nothing of which one it was.
    let found = tokens.iter().fold(None, |found, token| if token.hash == hash { Some(token) } else { found });
    found.map(|token| Some(token.user.as_str())).ok_or_else(|| unauthorized("this token is not known here"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_tokens_is_its_owners_and_its_mistakes_are_named_by_line() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens");
        let read = |text: &str, mode| {
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            read_tokens(&file).map(|tokens| tokens.len())
        };
        let good = "# who\nanna 0123456789abcdef\n\nben fedcba9876543210\n";
        assert_eq!(read(good, 0o600), Ok(2));
        assert!(read(good, 0o644).unwrap_err().contains("chmod 600"));
        assert!(read("anna short\n", 0o600).unwrap_err().contains(":1: the token of anna is too short"));
        let wrong = read("\nonlyonetoken0123456789\n", 0o600).unwrap_err();
        assert!(wrong.contains(":2: write a user's name") && !wrong.contains("0123456789"), "{wrong}");
        assert!(read("# nobody\n", 0o600).unwrap_err().contains("has no token"));
    }

    fn asked(tokens: &[Token], header: Option<&str>) -> Result<Option<String>, Kind> {
        let mut headers = HeaderMap::new();
        if let Some(header) = header {
            headers.insert(AUTHORIZATION, header.parse().unwrap());
        }
        user(tokens, &headers).map(|user| user.map(str::to_owned)).map_err(|problem| problem.kind)
    }

    #[test]
    fn only_known_tokens_come_in() {
        let tokens = [Token::new("anna", "s3cret"), Token::of_hash("ben", *blake3::hash(b"other").as_bytes())];
        assert_eq!(asked(&[], None), Ok(None));
        assert_eq!(asked(&tokens, Some("Bearer s3cret")), Ok(Some("anna".into())));
        assert_eq!(asked(&tokens, Some("bearer other")), Ok(Some("ben".into())));
        for header in [None, Some("Bearer s3cre"), Some("Basic s3cret"), Some("Bearer"), Some("Bearer "), Some("")] {
            assert_eq!(asked(&tokens, header), Err(Kind::Unauthorized), "{header:?}");
        }
    }
}
