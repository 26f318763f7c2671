//! `stoke dashboard`: the API and the dashboard on this machine's loopback, asked with this user's credentials. Owns who may ask here: whoever has the key of the URL.
//!
//! The key is behind a `#`, so that a browser sends it to nobody; the page keeps it in this origin's session and shows it with each request.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request as HttpRequest, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use stoke_coordinator::api::{Ask, Asked, router};
use stoke_protocol::identity::{TokenSecret, verify_secret};
use stoke_protocol::ids::Digest;
use stoke_protocol::message::client::{Refusal, RefusalCode, Reply, Request};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc};

use super::{connect, stop_signal};
use crate::Global;
use crate::client::{Answers, Client};
use crate::failure::{Exit, Failure, OrFail};
use crate::output;

const EXAMPLES: &str = "\
Examples:
  stoke dashboard                      prints a URL for a browser on this machine
  ssh -L 8411:127.0.0.1:8411 head stoke dashboard     the same from elsewhere";

const PORT: u16 = 8411;
/// Replies that wait for a browser.
const REPLIES_WAITING_MAX: usize = 4;

/// See the cluster in a browser: nodes, jobs with their curves, logs and what happened
///
/// Serves the dashboard and the HTTP API on this machine's loopback, to whoever has the key in the printed URL, with the rights of this user.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Address on the loopback; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value_t = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT))]
    listen: SocketAddr,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    if !args.listen.ip().is_loopback() {
        return Err(Failure::usage(format!(
            "{} is not on the loopback: what is said there is not encrypted",
            args.listen
        ))
        .help("for other machines start the coordinator with --api, or forward the port by ssh"));
    }
    let stop = stop_signal()?;
    let mut client = connect(global).await?;
    // Refused now rather than in the browser.
    client.ask(&Request::Cluster, crate::client::Repeat::Safe).await?;
    let listener = TcpListener::bind(args.listen).await.map_err(|error| {
        let exit = if error.kind() == std::io::ErrorKind::AddrInUse { Exit::Conflict } else { Exit::Negative };
        Failure::from_error(exit, error)
            .context(format!("listen on {}", args.listen))
            .help("choose another port with --listen")
    })?;
    let address = listener.local_addr().or_fail(Exit::Negative, "find the own address")?;
    let secret = TokenSecret::random();
    let url = format!("http://{address}/#key={}", hex(&secret.expose()));
    if global.json {
        output::print_json_line(&serde_json::json!({ "url": url, "address": address.to_string() }))?;
    } else {
        output::print(&format!("{url}\nwhoever has this URL on this machine acts as you; Ctrl-C ends it\n"))?;
    }
    let ask = Arc::new(Remote(Arc::new(Mutex::new(client))));
    let router: Router = router(ask).layer(middleware::from_fn_with_state(secret.hash(), admit));
    let served = axum::serve(listener, router);
    tokio::select! {
        () = stop => Ok(Exit::Ok),
        ended = served => ended.map(|()| Exit::Ok).or_fail(Exit::Negative, "serve the dashboard"),
    }
}

/// The page itself has no secrets; everything else needs the key.
async fn admit(State(expected): State<Digest>, request: HttpRequest, next: Next) -> Response {
    let shown = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let secret = shown.and_then(|value| value.strip_prefix("Bearer ")).and_then(unhex);
    let admitted = secret.is_some_and(|secret| verify_secret(&expected, &TokenSecret::from_bytes(secret)));
    if admitted || !request.uri().path().starts_with("/v1/") {
        return next.run(request).await;
    }
    let mend = "open the URL that `stoke dashboard` has printed, with all that is behind its #";
    let error =
        serde_json::json!({ "code": "unauthenticated", "message": "the key is missing or wrong", "mend": mend });
    (StatusCode::UNAUTHORIZED, axum::Json(serde_json::json!({ "error": error }))).into_response()
}

/// The cluster through this user's connection.
struct Remote(Arc<Mutex<Client>>);

impl Ask for Remote {
    fn ask(&self, request: Request) -> Asked {
        let client = self.0.clone();
        Box::pin(async move {
            let answers = client.lock().await.stream(&request).await.map_err(|failure| unavailable(&failure))?;
            let (replies, arriving) = mpsc::channel(REPLIES_WAITING_MAX);
            tokio::spawn(relay(answers, replies));
            Ok(arriving)
        })
    }
}

async fn relay(mut answers: Answers, replies: mpsc::Sender<Reply>) {
    loop {
        let reply = tokio::select! {
            reply = answers.next() => reply,
            // Dropping the answers tells the coordinator.
            () = replies.closed() => return,
        };
        let reply = match reply {
            Ok(Some(reply)) => reply,
            Ok(None) => return,
            Err(failure) => Reply::Refused(unavailable(&failure)),
        };
        let last = matches!(reply, Reply::Refused(_));
        if replies.send(reply).await.is_err() || last {
            return;
        }
    }
}

fn unavailable(failure: &Failure) -> Refusal {
    let mend = "see whether the coordinator runs: `stoke status`, `stoke doctor`";
    Refusal { code: RefusalCode::Unavailable, message: failure.message().to_string(), mend: mend.into() }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 16]> {
    let digits = text.as_bytes();
    let mut bytes = [0; 16];
    if digits.len() != 32 || !text.is_ascii() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.as_chunks::<2>().0) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_of_the_url_is_read_back_and_nothing_else() {
        let secret = TokenSecret::random();
        assert_eq!(unhex(&hex(&secret.expose())), Some(secret.expose()));
        for wrong in [
            "",
            "00",
            "zz000000000000000000000000000000",
            "\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}",
        ] {
            assert_eq!(unhex(wrong), None, "{wrong}");
        }
    }
}
