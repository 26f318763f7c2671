//! `stoke token`: let machines and people in.

use clap::{Subcommand, ValueEnum};
use stoke_protocol::ids::TokenId;
use stoke_protocol::message::client::{Reply, Request, TokenScope};

use super::connect;
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::{json, output};

const CREATE_EXAMPLES: &str = "\
Examples:
  stoke token create --role node
  stoke node --join - --coordinator HOST:PORT --dir DIR       on the machine that joins
  stoke token create --role submitter --ttl 15m
  stoke login --join - --coordinator HOST:PORT                where that person is";
const LIST_EXAMPLES: &str = "Example:\n  stoke token list";
const REVOKE_EXAMPLES: &str = "Example:\n  stoke token revoke token-4";

#[derive(Subcommand, Debug)]
pub enum Token {
    Create(Create),
    List(List),
    Revoke(Revoke),
}

/// Create a token that admits one node or one user, once
#[derive(clap::Args, Debug)]
#[command(after_help = CREATE_EXAMPLES)]
pub struct Create {
    /// What its holder becomes
    #[arg(long, value_enum)]
    role: Role,

    /// How long it can be used: 30s, 15m, 1h, 2d
    #[arg(long, default_value = "1h", value_parser = seconds)]
    ttl: u64,
}

/// List tokens and what became of them; secrets are kept nowhere
#[derive(clap::Args, Debug)]
#[command(after_help = LIST_EXAMPLES)]
pub struct List {}

/// Make a token useless; who has joined with it stays
#[derive(clap::Args, Debug)]
#[command(after_help = REVOKE_EXAMPLES)]
pub struct Revoke {
    /// The token's id, e.g. token-4
    token: TokenId,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Role {
    Node,
    Admin,
    Operator,
    Submitter,
    Viewer,
}

impl Role {
    fn scope(self) -> TokenScope {
        match self {
            Self::Node => TokenScope::Node,
            Self::Admin => TokenScope::Admin,
            Self::Operator => TokenScope::Operator,
            Self::Submitter => TokenScope::Submitter,
            Self::Viewer => TokenScope::Viewer,
        }
    }
}

pub async fn run(command: Token, global: &Global) -> Result<Exit, Failure> {
    match command {
        Token::Create(args) => create(args, global).await,
        Token::List(_) => list(global).await,
        Token::Revoke(args) => revoke(args, global).await,
    }
}

async fn create(args: Create, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let request = Request::TokenCreate { scope: args.role.scope(), ttl_seconds: args.ttl };
    let repeat = Repeat::Unsafe("look with `stoke token list`, revoke what you do not know, and create it again");
    let Reply::Token { token, text } = client.ask(&request, repeat).await? else { return Err(unexpected()) };
    if global.json {
        let role = json::scope(args.role.scope());
        let document = serde_json::json!({
            "token": token.to_string(), "role": role, "ttl_seconds": args.ttl, "text": text,
        });
        output::print_json(&document)?;
    } else {
        // Alone on stdout, so that it can be piped; shown this once.
        output::print(&format!("{text}\n"))?;
        output::say(format_args!(
            "{token} admits one {}, once, within {}",
            json::scope(args.role.scope()),
            output::duration_ms(args.ttl * 1000)
        ));
    }
    Ok(Exit::Ok)
}

async fn list(global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let Reply::Tokens(tokens) = client.ask(&Request::TokenList, Repeat::Safe).await? else { return Err(unexpected()) };
    if global.json {
        let tokens: Vec<_> = tokens.iter().map(json::token).collect();
        output::print_json(&serde_json::json!({ "tokens": tokens }))?;
        return Ok(Exit::Ok);
    }
    let mut table = output::Table::new(&["TOKEN", "ROLE", "STATE", "EXPIRES", "CREATED BY"]);
    for token in tokens.iter() {
        table.row([
            token.token.to_string(),
            json::scope(token.scope).to_owned(),
            json::token_state(token.state).to_owned(),
            output::moment(token.expires_ms),
            token.created_by.clone(),
        ]);
    }
    output::print(&table.render())?;
    Ok(Exit::Ok)
}

async fn revoke(args: Revoke, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let reply = client.ask(&Request::TokenRevoke { token: args.token }, Repeat::Safe).await?;
    let Reply::TokenRevoked { token } = reply else { return Err(unexpected()) };
    if global.json {
        output::print_json(&serde_json::json!({ "token": token.to_string(), "revoked": true }))?;
    } else {
        output::print(&format!("{token} is revoked\n"))?;
    }
    Ok(Exit::Ok)
}

/// `15m` to seconds.
pub(super) fn seconds(text: &str) -> Result<u64, String> {
    const UNITS: [(char, u64); 4] = [('s', 1), ('m', 60), ('h', 3600), ('d', 86_400)];
    let found = UNITS.iter().find_map(|(unit, seconds)| Some((text.strip_suffix(*unit)?, *seconds)));
    let (digits, unit) = found.ok_or("write a number and s, m, h or d, for example 15m")?;
    let count: u64 = digits.parse().map_err(|_| "write a number and s, m, h or d, for example 15m")?;
    count.checked_mul(unit).filter(|seconds| *seconds > 0).ok_or_else(|| "use at least 1s".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_are_read_with_their_unit() {
        assert_eq!(
            (seconds("30s"), seconds("15m"), seconds("1h"), seconds("2d")),
            (Ok(30), Ok(900), Ok(3600), Ok(172_800))
        );
        assert!(seconds("15").is_err() && seconds("h").is_err() && seconds("0s").is_err() && seconds("-1h").is_err());
    }
}
