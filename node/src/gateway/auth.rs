//! Who may ask. Owns the comparison of bearer tokens; keeps hashes, never the tokens.

use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;

use super::error::{Kind, Problem};

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
