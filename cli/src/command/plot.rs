//! `stoke plot`: how a job with `[rl]` has learned, as a picture (SVG) or as numbers.

use std::path::PathBuf;

use stoke_node::checkpoint as store;

use super::checkpoint::{self, Located};
use crate::Global;
use crate::chart::{Panel, draw};
use crate::failure::{Exit, Failure, OrFail};
use crate::{json, output};

/// What is drawn unless columns are named: what algorithms lack is left out.
const SHOWN: [&str; 7] = ["episode_return", "explained_variance", "approx_kl", "entropy", "lag", "q_value", "td_loss"];
const STEPS: &str = "env_steps";

const EXAMPLES: &str = "\
Examples:
  stoke plot job-3                                          writes NAME.svg here
  stoke plot job-3 --out curve.svg --columns episode_return,value_loss
  stoke plot job-3 --json | jq '.points[-1]'";

/// Draw how a job with [rl] has learned: returns and other figures over environment steps
///
/// The figures are a part of each checkpoint, so a job that runs shows what it has learned until its newest one. A point is a round; above 4,096
/// rounds it is every second, fourth, ... round.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A job (its newest checkpoint), or a checkpoint's folder or URI
    #[arg(value_name = "JOB|CHECKPOINT")]
    what: String,

    /// Where the picture goes [default: the job's name with .svg, in this folder]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// Figures to draw, a panel each [default: those of returns and soundness that the algorithm has]
    #[arg(long, value_name = "COLUMN", value_delimiter = ',')]
    columns: Vec<String>,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let found = checkpoint::locate(&args.what, global).await?;
    let as_json = global.json;
    tokio::task::spawn_blocking(move || plot(&args, &found, as_json)).await.or_fail(Exit::Negative, "plot")?
}

fn plot(args: &Args, Located { uri, manifest_blake3 }: &Located, as_json: bool) -> Result<Exit, Failure> {
    let (manifest, tensors) = store::load(uri, *manifest_blake3).map_err(|error| checkpoint::failure(error, uri))?;
    if manifest.trainer != "rl" {
        let trainer = &manifest.trainer;
        return Err(Failure::usage(format!("{uri} is of trainer {trainer:?}, whose curve is not kept"))
            .help("`stoke plot` draws jobs with [rl]"));
    }
    let curve =
        stoke_jobs::rl::curve(&manifest.spec, &tensors).or_fail(Exit::Negative, format!("read the curve of {uri}"))?;
    let columns: Vec<&str> = curve.columns().collect();
    let wanted: Vec<&str> = match args.columns.is_empty() {
        true => SHOWN.into_iter().filter(|column| columns.contains(column)).collect(),
        false => args.columns.iter().map(String::as_str).collect(),
    };
    if let Some(unknown) = wanted.iter().find(|column| !columns.contains(column)) {
        return Err(
            Failure::usage(format!("there is no column {unknown:?}")).help(format!("one of {}", columns.join(", ")))
        );
    }
    let points = curve.points();
    if as_json {
        let row = |point: &Vec<f32>| -> serde_json::Map<String, serde_json::Value> {
            columns.iter().zip(point).map(|(column, value)| ((*column).to_owned(), json::float(*value))).collect()
        };
        let points: Vec<_> = points.iter().map(row).collect();
        output::print_json(&serde_json::json!({ "uri": uri, "step": manifest.step.0, "points": points }))?;
        return Ok(Exit::Ok);
    }
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from(format!("{}.svg", manifest.name)));
    if out.extension().is_none_or(|kind| kind != "svg") {
        return Err(Failure::usage(format!("{}: the picture is an SVG", out.display()))
            .help("name it .svg; a browser shows it, `rsvg-convert` makes a PNG of it"));
    }
    let panels: Vec<Panel<'_>> = wanted.iter().map(|column| panel(&points, &columns, column)).collect();
    // Not those that the algorithm never knows.
    let panels: Vec<Panel<'_>> =
        panels.into_iter().filter(|panel| !args.columns.is_empty() || !panel.points.is_empty()).collect();
    let steps = points.last().map_or(0, |point| point[0] as u64);
    let title = format!("{}, {} env steps", manifest.name, output::grouped(steps));
    let picture = draw(&title, "environment steps", &panels).or_fail(Exit::Negative, "draw")?;
    std::fs::write(&out, picture).or_fail(Exit::Negative, format!("write {}", out.display()))?;
    output::print(&format!(
        "{}: {} over {}\n",
        out.display(),
        panels.iter().map(|panel| panel.name).collect::<Vec<_>>().join(", "),
        output::count(points.len() as u64, "round")
    ))?;
    Ok(Exit::Ok)
}

fn panel<'a>(points: &[Vec<f32>], columns: &[&str], column: &'a str) -> Panel<'a> {
    let at = |name: &str| columns.iter().position(|other| *other == name).expect("columns were looked at");
    let (x, y) = (at(STEPS), at(column));
    let points = points.iter().map(|point| (f64::from(point[x]), f64::from(point[y])));
    Panel { name: column, points: points.filter(|(_, value)| value.is_finite()).collect() }
}
