//! `stoke eval`: what a policy that was learned is worth, on this machine, over seeds that training never had.

use stoke_jobs::rl::scan_budget::{Rival, WorldConfig};
use stoke_jobs::rl::{Algorithm, Explore, Learned, Returns};
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
/// Episodes run on this machine, from the newest checkpoint of the job. For scan-budget it also tells what baselines and oracles find per probe in the same worlds. Environments of gymnasium's need its Python here, as the job's [rl] says.
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

    /// Take the most probable action instead of drawing one from the policy (DQN always takes the best)
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
            .help("`stoke predict` is for classifiers; held-out figures of any trainer are in `stoke status JOB`"));
    }
    let learned = Learned::new(&manifest.spec, manifest.lanes, &tensors)
        .or_fail(Exit::Negative, format!("make the policy of {uri} and its environment"))?;
    let explore = if args.greedy { Explore::Greedy } else { Explore::Sample };
    let world = learned.world().or_fail(Exit::Negative, "read the options of the environment")?;
    let mut seeds: Vec<(u64, Returns)> = Vec::new();
    let mut finders = world.as_ref().map(Finders::new);
    for seed in (args.first_seed..).take(args.seeds as usize) {
        let episodes = (seed, args.episodes as usize);
        let returns =
            learned.evaluate(episodes, explore).or_fail(Exit::Negative, format!("run episodes of seed {seed}"))?;
        if let (Some(finders), Some(world)) = (&mut finders, &world) {
            let rivals = learned.rivals(world, episodes);
            finders.push(seed, &returns, rivals.or_fail(Exit::Negative, format!("run baselines of seed {seed}"))?);
        }
        seeds.push((seed, returns));
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
        let mut told = serde_json::json!({
            "uri": uri, "environment": name, "step": step, "greedy": args.greedy, "episodes": all.returns.len(),
            "return_mean": all.mean(), "return_std": all.deviation(), "length_mean": all.length(), "seeds": each,
        });
        if let Some(finders) = &finders {
            told["services_per_probe"] = finders.json();
        }
        output::print_json(&told)?;
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
    let how = match (learned.algorithm(), args.greedy) {
        (Algorithm::Dqn, _) => "the actions of the highest values",
        (_, true) => "the most probable actions",
        (_, false) => "actions drawn from the policy",
    };
    let mut text = format!("{name} by {} at step {step}, {how}\n\n{}", manifest.name, table.render());
    if let Some(finders) = &finders {
        text.push_str(&finders.text());
    }
    output::print(&text)?;
    Ok(Exit::Ok)
}

/// Who found how many services per probe, over the seeds so far: the policy, baselines and oracles in the same worlds.
struct Finders {
    /// Batches of an episode: a reward is a batch's services per probe.
    batches: f64,
    seeds: Vec<Found>,
}

/// Services per probe in the worlds of one seed.
struct Found {
    seed: u64,
    policy: f64,
    rivals: Vec<Rival>,
}

impl Found {
    /// The policy's, then those of the others.
    fn figures(&self) -> Vec<f64> {
        std::iter::once(self.policy).chain(self.rivals.iter().map(Rival::mean)).collect()
    }
}

impl Finders {
    fn new(world: &WorldConfig) -> Self {
        Self { batches: world.budget.into(), seeds: Vec::new() }
    }

    fn push(&mut self, seed: u64, returns: &Returns, rivals: Vec<Rival>) {
        self.seeds.push(Found { seed, policy: returns.mean() / self.batches, rivals });
    }

    fn rivals(&self) -> &[Rival] {
        self.seeds.first().map_or(&[], |found| &found.rivals)
    }

    /// The policy's mean, then those of the others. Each seed has as many episodes.
    fn means(&self) -> Vec<f64> {
        let figures: Vec<Vec<f64>> = self.seeds.iter().map(Found::figures).collect();
        let mean = |at: usize| figures.iter().map(|seed| seed[at]).sum::<f64>() / figures.len().max(1) as f64;
        (0..=self.rivals().len()).map(mean).collect()
    }

    /// How many times as many as the best of those that are told nothing.
    fn times_best_baseline(&self) -> f64 {
        let means = self.means();
        let baselines = self.rivals().iter().zip(&means[1..]).filter(|(rival, _)| !rival.oracle);
        means[0] / baselines.map(|(_, mean)| *mean).fold(f64::MIN_POSITIVE, f64::max)
    }

    fn json(&self) -> serde_json::Value {
        let names = || std::iter::once("policy").chain(self.rivals().iter().map(|rival| rival.name));
        let object = |figures: Vec<f64>| -> serde_json::Map<String, serde_json::Value> {
            names().map(|name| name.replace(' ', "_")).zip(figures.into_iter().map(Into::into)).collect()
        };
        let seed = |found: &Found| {
            let mut told = object(found.figures());
            told.insert("seed".to_owned(), found.seed.into());
            told
        };
        let mut told = object(self.means());
        told.insert("times_best_baseline".to_owned(), self.times_best_baseline().into());
        told.insert("seeds".to_owned(), self.seeds.iter().map(seed).collect());
        told.into()
    }

    fn text(&self) -> String {
        let headings: Vec<&str> =
            ["seed", "policy"].into_iter().chain(self.rivals().iter().map(|rival| rival.name)).collect();
        let mut table = output::Table::new(&headings);
        let row = |name: String, figures: Vec<f64>| -> Vec<String> {
            std::iter::once(name).chain(figures.into_iter().map(|figure| format!("{figure:.3}"))).collect()
        };
        for found in &self.seeds {
            table.cells(row(found.seed.to_string(), found.figures()));
        }
        table.cells(row("all".to_owned(), self.means()));
        let times = self.times_best_baseline();
        format!(
            "\nservices found per probe, in the same worlds: the policy has {times:.2} times the best baseline\n(who is told rates or services is told what no scanner knows)\n\n{}",
            table.render()
        )
    }
}
