//! `stoke login`: turn a token into a user's credentials in a folder.

use std::path::Path;

use stoke_protocol::identity::{JoinToken, KeyRequest};
use stoke_protocol::message::client::{Reply, Request};
use stoke_protocol::message::join::Wants;
use stoke_protocol::transport::{Endpoint, Io, TransportError};

use crate::Global;
use crate::client::{Client, ClusterFile, Repeat, any_address, resolve, transport_failure};
use crate::failure::{Exit, Failure, OrFail};
use crate::output;
use crate::place::{self, CLUSTER_FILE};

const EXAMPLES: &str = "\
Examples:
  stoke login --join - --coordinator head.example.org:7878 < token.txt
  export STOKE_CLUSTER=~/prod && stoke login --join TOKEN --coordinator 10.0.0.1:7878 && stoke status

The second form is for a machine that has a local cluster of `stoke up` too: credentials go to the folder of --cluster or STOKE_CLUSTER.";

/// Exchange a join token for credentials of your own
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The token of `stoke token create`; `-` reads it from standard input, so that it does not show in the process list
    #[arg(long, value_name = "TOKEN")]
    join: String,

    /// Where the coordinator answers
    #[arg(long, value_name = "HOST:PORT", required = true)]
    coordinator: Vec<String>,

    /// How the cluster calls you [default: your login name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let dir = place::cluster_dir(global.cluster.as_deref())?;
    must_be_free(&dir)?;
    let token = read_token(&args.join)?;
    let name = args.name.or_else(|| std::env::var("USER").ok()).unwrap_or_else(|| "user".to_owned());
    let io = Io::thread("stoke-net").map_err(transport_failure)?;
    let mut refused = None;
    for coordinator in &args.coordinator {
        for address in resolve(coordinator).await? {
            let endpoint = Endpoint::stranger(&io, any_address(address)).map_err(transport_failure)?;
            let key = KeyRequest::new().or_fail(Exit::Negative, "make a key")?;
            let credentials = match endpoint.join(address, &token, Wants::User { name: name.clone() }, key).await {
                Ok(credentials) => credentials,
                Err(error) => {
                    let failure = join_failure(error);
                    // A token that was refused is refused everywhere; silence may end at the next address.
                    if failure.exit == Exit::Denied {
                        return Err(failure);
                    }
                    refused = Some(failure);
                    continue;
                }
            };
            credentials.save(&dir).or_fail(Exit::Negative, format!("save credentials in {}", dir.display()))?;
            let identity = credentials.identity();
            let file =
                ClusterFile { cluster: identity.cluster.to_string(), coordinator: args.coordinator.clone(), api: None };
            file.write(&dir)?;
            let api = api_of(&dir).await;
            let file = ClusterFile { api, ..file };
            file.write(&dir)?;
            let subject = identity.subject.to_string();
            if global.json {
                output::print_json(&serde_json::json!({
                    "dir": dir, "cluster": file.cluster, "you": subject, "coordinator": file.coordinator,
                }))?;
            } else {
                output::print(&format!(
                    "you are {subject} of cluster {}; credentials in {}\n",
                    file.cluster,
                    dir.display()
                ))?;
            }
            return Ok(Exit::Ok);
        }
    }
    Err(refused.unwrap_or_else(|| Failure::usage("no coordinator address to log in to")))
}

/// The address of the API, for other people's clients. Nothing here needs it: where it cannot be asked for, it is left out.
async fn api_of(dir: &Path) -> Option<String> {
    let mut client = Client::open(dir).await.ok()?;
    match client.ask(&Request::Cluster, Repeat::Safe).await {
        Ok(Reply::Cluster(view)) => view.api,
        Ok(_) | Err(_) => None,
    }
}

fn join_failure(error: TransportError) -> Failure {
    let taken = matches!(&error, TransportError::JoinRefused { reason } if reason.contains("has joined already"));
    let failure = transport_failure(error);
    if taken { failure.help("give another name with --name") } else { failure }
}

/// The token itself, or the first line of standard input for `-`.
pub fn read_token(text: &str) -> Result<JoinToken, Failure> {
    let mut line = text.to_owned();
    if text == "-" {
        line.clear();
        std::io::stdin().read_line(&mut line).or_fail(Exit::Usage, "read the join token from standard input")?;
    }
    line.trim().parse().map_err(|error| {
        Failure::from_error(Exit::Usage, anyhow::Error::from(error))
            .help("ask an admin for one: `stoke token create --role ...`")
    })
}

/// Credentials are never replaced by accident: they cannot be had again without a token.
fn must_be_free(dir: &Path) -> Result<(), Failure> {
    let taken = if dir.join("coordinator").is_dir() {
        "the local cluster of this machine"
    } else if dir.join(CLUSTER_FILE).exists() {
        "credentials already"
    } else {
        return Ok(());
    };
    Err(Failure::new(Exit::Conflict, format!("{} holds {taken}", dir.display()))
        .help("keep these credentials in another folder: `stoke --cluster ~/prod login ...`, then `export STOKE_CLUSTER=~/prod`"))
}
