//! Join tokens: what a machine or a person is given to enter the cluster once. Owns their text and their comparison; never stores one
//! (the coordinator keeps only the secret's hash).

use std::fmt;
use std::str::FromStr;

use ring::rand::{SecureRandom, SystemRandom};
use subtle::ConstantTimeEq;

use crate::ids::{Digest, TokenId, parse_hex};

const PREFIX: &str = "stoke1";
const HASH_CONTEXT: &str = "stoke join token secret v1";

/// The part of a token that must not be seen. It prints as dots; [`TokenSecret::expose`] is the one way out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TokenSecret([u8; 16]);

/// `stoke1.<hash of the CA>.<id>.<secret>`: enough to know the cluster before trusting it, and to be let in once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinToken {
    /// BLAKE3 of the cluster CA's certificate (DER): the joiner trusts this authority and no other.
    pub ca_hash: Digest,
    pub id: TokenId,
    pub secret: TokenSecret,
}

/// What is wrong with the text of a token. The text itself is never repeated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error(
        "join token has {parts} parts separated by dots, expected 4 (stoke1.<ca hash>.<id>.<secret>): was it cut when copied?"
    )]
    Parts { parts: usize },
    #[error("join token starts with {found:?}, expected \"stoke1\": it was made by another program or a newer release")]
    Prefix { found: String },
    #[error("join token's CA hash has {digits} characters, expected 64 hexadecimal digits: was it cut when copied?")]
    CaHash { digits: usize },
    #[error("join token's id {found:?} is not a number")]
    Id { found: String },
    #[error("join token's secret has {digits} characters, expected 32 hexadecimal digits: was it cut when copied?")]
    Secret { digits: usize },
}

impl TokenSecret {
    /// A fresh secret from the system's random source.
    pub fn random() -> Self {
        let mut bytes = [0; 16];
        SystemRandom::new().fill(&mut bytes).expect("the system's random source answers");
        Self(bytes)
    }

    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The secret itself, for the join request only.
    pub fn expose(&self) -> [u8; 16] {
        self.0
    }

    /// What the coordinator stores and looks up.
    pub fn hash(&self) -> Digest {
        Digest(blake3::derive_key(HASH_CONTEXT, &self.0))
    }
}

/// Whether `secret` is the one whose hash was stored, in time that does not depend on where they differ (I33).
pub fn verify_secret(stored: &Digest, secret: &TokenSecret) -> bool {
    stored.0.ct_eq(&secret.hash().0).into()
}

impl JoinToken {
    /// What the coordinator stores in place of the secret.
    pub fn secret_hash(&self) -> Digest {
        self.secret.hash()
    }
}

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenSecret(..)")
    }
}

/// The whole token, secret included: for the person who asked for it, never for a log.
impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}.{}.{}.", self.ca_hash, self.id.0)?;
        self.secret.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;
    fn from_str(input: &str) -> Result<Self, TokenError> {
        let parts: Vec<&str> = input.trim().splitn(9, '.').collect();
        if let Some(first) = parts.first()
            && *first != PREFIX
            && parts.len() > 1
        {
            return Err(TokenError::Prefix { found: first.chars().take(16).collect() });
        }
        let [_, ca_hash, id, secret] = parts[..] else {
            return Err(TokenError::Parts { parts: parts.len() });
        };
        let digits = ca_hash.len();
        let ca_hash = ca_hash.parse().map_err(|_| TokenError::CaHash { digits })?;
        let id = id.parse().map(TokenId).map_err(|_| TokenError::Id { found: id.chars().take(24).collect() })?;
        let digits = secret.len();
        let secret = parse_hex(secret).map(TokenSecret).ok_or(TokenError::Secret { digits })?;
        Ok(Self { ca_hash, id, secret })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken { ca_hash: Digest([0x5a; 32]), id: TokenId(12), secret: TokenSecret::from_bytes([0xc3; 16]) }
    }

    #[test]
    fn tokens_print_and_parse_back() {
        assert_eq!(token().to_string().parse(), Ok(token()));
        assert_eq!(format!(" {}\n", token()).parse(), Ok(token()));
    }

    #[test]
    fn a_broken_token_says_what_is_broken() {
        let text = token().to_string();
        let parse = |text: &str| text.parse::<JoinToken>().unwrap_err();
        assert_eq!(parse(""), TokenError::Parts { parts: 1 });
        assert_eq!(parse(&text[..text.len() - 2]), TokenError::Secret { digits: 30 });
        assert_eq!(parse("K10abc.1.2.3"), TokenError::Prefix { found: "K10abc".to_owned() });
        assert_eq!(parse("stoke1.5a.12.c3"), TokenError::CaHash { digits: 2 });
        assert_eq!(parse(&text.replace(".12.", ".x.")), TokenError::Id { found: "x".to_owned() });
        assert!(parse(&format!("{text}.{text}.a.b.c.d.e.f.g")).to_string().contains("parts"));
    }

    #[test]
    fn debug_hides_the_secret() {
        assert!(!format!("{:?}", token()).contains("c3c3"));
    }

    #[test]
    fn only_the_right_secret_verifies() {
        let stored = token().secret_hash();
        assert!(verify_secret(&stored, &token().secret));
        assert!(!verify_secret(&stored, &TokenSecret::from_bytes([0; 16])));
    }
}
