//! Join tokens: each lets one member in, once, for a time, in one role. Owns their hashes and their states; never sees a secret.
//!
//! T1: a token goes Open → Used | Revoked and never back; whether it has expired is a question of the time of asking (I33).
//! T2: ids are never used again.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{Digest, TokenId};
use stoke_protocol::message::client::{TokenScope, TokenState, TokenView};
use stoke_protocol::message::join::Wants;

use super::cluster::Refused;
use super::time::Time;

/// Tokens that are remembered: when the table is full, the oldest that is not open is forgotten, which refuses it all the same.
const TOKENS_MAX: usize = 10_000;
/// Open tokens: more are a script that has gone wild.
pub const TOKENS_OPEN_MAX: usize = 1_000;
/// The longest life of a token: 30 days.
pub const TTL_SECONDS_MAX: u64 = 30 * 24 * 3_600;

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Tokens {
    last: TokenId,
    /// Tokens that were used up.
    spent: u64,
    tokens: BTreeMap<TokenId, Token>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Token {
    scope: TokenScope,
    secret_hash: Digest,
    expires: Time,
    by: String,
    fate: Fate,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Fate {
    Open,
    Used(Time),
    Revoked,
}

impl Tokens {
    pub fn create(&mut self, scope: TokenScope, secret_hash: Digest, expires: Time, by: String) -> TokenId {
        self.last = self.last.next();
        if self.tokens.len() >= TOKENS_MAX {
            let oldest = self.tokens.iter().find(|(_, token)| token.fate != Fate::Open).map(|(id, _)| *id);
            let oldest = oldest.or_else(|| self.tokens.keys().next().copied());
            oldest.map(|id| self.tokens.remove(&id));
        }
        self.tokens.insert(self.last, Token { scope, secret_hash, expires, by, fate: Fate::Open });
        self.last
    }

    /// The newest token's id.
    pub fn last(&self) -> TokenId {
        self.last
    }

    pub fn open(&self, now: Time) -> usize {
        self.tokens.values().filter(|token| token.fate == Fate::Open && now < token.expires).count()
    }

    /// Why a token cannot be revoked, or nothing.
    pub fn check_revoke(&self, id: TokenId) -> Result<(), Refused> {
        match self.tokens.get(&id).map(|token| token.fate) {
            None => Err(Refused::NotFound(format!("there is no {id}"))),
            Some(Fate::Open | Fate::Revoked) => Ok(()),
            Some(Fate::Used(_)) => {
                Err(Refused::Conflict(format!("{id} was used already: what joined with it is a member now")))
            }
        }
    }

    pub fn revoke(&mut self, id: TokenId) {
        if let Some(token) = self.tokens.get_mut(&id)
            && token.fate == Fate::Open
        {
            token.fate = Fate::Revoked;
        }
    }

    /// Whether this secret lets in whoever wants this; the error is for the one who asks. An unknown id and a wrong secret read the same.
    pub fn check(&self, now: Time, id: TokenId, secret_hash: &Digest, wants: &Wants) -> Result<TokenScope, String> {
        let unknown = || format!("{id} is not a token of this cluster: was it copied whole, and made by this cluster?");
        let token = self.tokens.get(&id).ok_or_else(unknown)?;
        if !equal(&token.secret_hash, secret_hash) {
            return Err(unknown());
        }
        match token.fate {
            Fate::Open => {}
            Fate::Used(_) => return Err(format!("{id} was used already: a token lets in once, make another")),
            Fate::Revoked => return Err(format!("{id} was revoked: ask for another")),
        }
        if token.expires <= now {
            return Err(format!("{id} has expired: make another with `stoke token create`"));
        }
        match (wants, token.scope) {
            (Wants::Node { .. }, TokenScope::Node) => Ok(token.scope),
            (Wants::User { .. }, scope) if scope != TokenScope::Node => Ok(scope),
            (Wants::Node { .. }, scope) => {
                Err(format!("{id} is for a user ({}), not for a node", format!("{scope:?}").to_lowercase()))
            }
            (Wants::User { .. }, _) => Err(format!("{id} is for a node, not for a user")),
        }
    }

    pub fn spend(&mut self, now: Time, id: TokenId) {
        if let Some(token) = self.tokens.get_mut(&id)
            && token.fate == Fate::Open
        {
            token.fate = Fate::Used(now);
            self.spent += 1;
        }
    }

    /// The role of a token that `check` has let pass.
    pub fn scope(&self, id: TokenId) -> TokenScope {
        self.tokens.get(&id).map_or(TokenScope::Viewer, |token| token.scope)
    }

    /// How many members tokens have let in (T1).
    pub fn spent(&self) -> u64 {
        self.spent
    }

    pub fn views(&self, now: Time) -> Vec<TokenView> {
        let state = |token: &Token| match token.fate {
            Fate::Open if token.expires <= now => TokenState::Expired,
            Fate::Open => TokenState::Open,
            Fate::Used(_) => TokenState::Used,
            Fate::Revoked => TokenState::Revoked,
        };
        let view = |(id, token): (&TokenId, &Token)| TokenView {
            token: *id,
            scope: token.scope,
            state: state(token),
            expires_ms: token.expires.0,
            created_by: token.by.clone(),
        };
        self.tokens.iter().map(view).collect()
    }
}

/// In time that does not depend on where they differ (I33).
fn equal(a: &Digest, b: &Digest) -> bool {
    a.0.iter().zip(&b.0).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: Digest = Digest([7; 32]);

    fn node() -> Wants {
        Wants::Node { name: "n".into() }
    }

    #[test]
    fn a_token_lets_in_once_in_its_role_and_time() {
        let mut tokens = Tokens::default();
        let id = tokens.create(TokenScope::Node, SECRET, Time(100), "ada".into());
        assert_eq!(tokens.check(Time(1), id, &SECRET, &node()), Ok(TokenScope::Node));
        assert!(tokens.check(Time(100), id, &SECRET, &node()).unwrap_err().contains("expired"));
        assert!(tokens.check(Time(1), id, &Digest([8; 32]), &node()).unwrap_err().contains("not a token"));
        assert!(
            tokens.check(Time(1), id, &SECRET, &Wants::User { name: "u".into() }).unwrap_err().contains("for a node")
        );
        tokens.spend(Time(2), id);
        assert!(tokens.check(Time(3), id, &SECRET, &node()).unwrap_err().contains("used already"));
        assert!(tokens.check_revoke(id).is_err());
    }

    #[test]
    fn a_revoked_token_stays_revoked() {
        let mut tokens = Tokens::default();
        let id = tokens.create(TokenScope::Viewer, SECRET, Time(100), "ada".into());
        tokens.revoke(id);
        assert!(tokens.check(Time(1), id, &SECRET, &Wants::User { name: "u".into() }).unwrap_err().contains("revoked"));
        assert_eq!(tokens.views(Time(1))[0].state, TokenState::Revoked);
    }
}
