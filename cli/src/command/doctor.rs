//! `stoke doctor`: what of this machine and its way to the coordinator is not as it should be, and what to do about it. Only looks: changes
//! nothing.

use serde_json::{Value, json};

use crate::Global;
use crate::diagnosis::{self, Finding, Status};
use crate::failure::{Exit, Failure};
use crate::{output, place};

const EXAMPLES: &str = "\
Examples:
  stoke doctor
  stoke doctor --json | jq '.checks[] | select(.status != \"ok\")'";

/// Check this machine: UDP buffers, MTU, clock, ports, GPU, memory, disk, coordinator; exit code 1 if a check fails, 0 if there are only warnings
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {}

pub async fn run(_args: Args, global: &Global) -> Result<Exit, Failure> {
    let dir = place::cluster_dir(global.cluster.as_deref())?;
    let mut findings = diagnosis::machine(&dir);
    findings.extend(diagnosis::cluster(&dir).await);
    let failed = findings.iter().any(|finding| finding.status == Status::Fail);
    if global.json {
        let checks: Vec<Value> = findings.iter().map(to_json).collect();
        output::print_json(&json!({ "ok": !failed, "checks": checks }))?;
    } else {
        output::print(&render(&findings))?;
    }
    Ok(if failed { Exit::Negative } else { Exit::Ok })
}

fn to_json(finding: &Finding) -> Value {
    json!({
        "check": finding.check,
        "status": word(finding.status),
        "detail": finding.detail,
        "mend": finding.mend,
    })
}

fn render(findings: &[Finding]) -> String {
    let mut table = output::Table::bare();
    for finding in findings {
        table.row([word(finding.status).to_owned(), finding.check.to_owned(), finding.detail.clone()]);
        if let Some(mend) = &finding.mend {
            // A warning can be lived with.
            let word = if finding.status == Status::Fail { "mend" } else { "better" };
            table.row([String::new(), String::new(), format!("{word}: {mend}")]);
        }
    }
    table.render()
}

fn word(status: Status) -> &'static str {
    match status {
        Status::Ok => "ok",
        Status::Warn => "warn",
        Status::Fail => "fail",
    }
}
