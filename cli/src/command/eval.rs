//! `stoke eval`: what a policy that was learned is worth, on this machine, over seeds that training never had.

use stoke_jobs::rl::{Explore, Learned, Returns};
use stoke_node::checkpoint as store;

use super::checkpoint::{self, Located};
use crate::Global;
use crate::failure::{Exit, Failure, OrFail};
use crate::output;

const EXAMPLES: &str = "\
Examples:
  stoke eval job-3
  stoke eval FOLDER --episodes 20 --seeds 5
  stoke eval job-3 --greedy --json | jq .return_mean";

/// Run a policy that was learned, and tell its mean return and deviation over seeds
///
/// Episodes run on this machine, from the newest checkpoint of the job. Environments of gymnasium's need its Python here, as the job's [rl] says.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A job (its newest checkpoint), or a checkpoint's folder or URI
    #[arg(value_name = "JOB|CHECKPOINT")]
    what: String,

    /// Episodes for each seed
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    episodes: u32,

    /// Seeds, from --first-seed on: each has environments and draws of its own
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    seeds: u32,

    /// The first seed
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    first_seed: u64,

    /// Take the most probable action instead of drawing one from the policy
    #[arg(long)]
    greedy: bool,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let found = checkpoint::locate(&args.what, global).await?;
    let as_json = global.json;
    tokio::task::spawn_blocking(move || evaluate(&args, &found, as_json)).await.or_fail(Exit::Negative, "evaluate")?
}

fn evaluate(args: &Args, Located { uri, manifest_blake3 }: &Located, as_json: bool) -> Result<Exit, Failure> {
    let (manifest, tensors) = store::load(uri, *manifest_blake3).map_err(|error| checkpoint::failure(error, uri))?;
    if manifest.trainer != "rl" {
        return Err(Failure::usage(format!("{uri} is of trainer {:?}, and no policy", manifest.trainer))
            .help("`stoke predict` is for classifiers"));
    }
    let learned = Learned::new(&manifest.spec, manifest.lanes, &tensors)
        .or_fail(Exit::Negative, format!("make the policy of {uri} and its environment"))?;
    let explore = if args.greedy { Explore::Greedy } else { Explore::Sample };
    let mut seeds: Vec<(u64, Returns)> = Vec::new();
    for seed in (args.first_seed..).take(args.seeds as usize) {
        let returns = learned.evaluate((seed, args.episodes as usize), explore);
        seeds.push((seed, returns.or_fail(Exit::Negative, format!("run episodes of seed {seed}"))?));
    }
    let all = Returns {
        returns: seeds.iter().flat_map(|(_, seed)| seed.returns.iter().copied()).collect(),
        lengths: seeds.iter().flat_map(|(_, seed)| seed.lengths.iter().copied()).collect(),
    };
    let (name, step) = (&learned.environment().name, manifest.step.0);
    if as_json {
        let each: Vec<serde_json::Value> = seeds
            .iter()
            .map(|(seed, returns)| {
                serde_json::json!({ "seed": seed, "return_mean": returns.mean(), "return_std": returns.deviation(), "returns": returns.returns })
            })
            .collect();
        output::print_json(&serde_json::json!({
            "uri": uri, "environment": name, "step": step, "greedy": args.greedy, "episodes": all.returns.len(),
            "return_mean": all.mean(), "return_std": all.deviation(), "length_mean": all.length(), "seeds": each,
        }))?;
        return Ok(Exit::Ok);
    }
    let mut table = output::Table::new(&["seed", "episodes", "return", "deviation", "length"]);
    let row = |seed: String, returns: &Returns| {
        let figures = [returns.mean(), returns.deviation(), returns.length()].map(|figure| format!("{figure:.2}"));
        let [mean, deviation, length] = figures;
        [seed, returns.returns.len().to_string(), mean, deviation, length]
    };
    for (seed, returns) in &seeds {
        table.row(row(seed.to_string(), returns));
    }
    table.row(row("all".to_owned(), &all));
    let how = if args.greedy { "the most probable actions" } else { "actions drawn from the policy" };
    output::print(&format!("{name} by {} at step {step}, {how}\n\n{}", manifest.name, table.render()))?;
    Ok(Exit::Ok)
}
