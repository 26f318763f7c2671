//! `stoke predict`: a trained classifier on lines from standard input.

use std::io::BufRead;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use stoke_jobs::{Predict, Prediction};
use stoke_node::checkpoint as store;

use super::checkpoint;
use crate::Global;
use crate::failure::{Exit, Failure, OrFail};
use crate::{json, output};

const EXAMPLES: &str = "\
Examples:
  echo secure-login-paypa1.com | stoke predict --checkpoint FOLDER
  stoke predict --checkpoint job-3 --json < domains.txt";

/// Lines that wait for the model; more would only cost memory.
const BATCH_LINES: usize = 256;

/// Classify lines from standard input: label, probability and the line, tab-separated
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A checkpoint's folder or file:// URI, or a job (its newest checkpoint)
    #[arg(long, value_name = "CHECKPOINT|JOB")]
    checkpoint: String,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let uri = checkpoint::locate(&args.checkpoint, global).await?;
    let as_json = global.json;
    // Reading and computing block, and nothing else runs here.
    tokio::task::spawn_blocking(move || classify(&uri, as_json)).await.or_fail(Exit::Negative, "predict")?
}

fn classify(uri: &str, as_json: bool) -> Result<Exit, Failure> {
    let (manifest, tensors) = store::load(uri).map_err(|error| checkpoint::failure(error, uri))?;
    let mut classifier = stoke_jobs::classifier(&manifest.spec, &manifest.trainer, tensors)
        .or_fail(Exit::Negative, format!("build the {} model of {uri}", manifest.trainer))?;
    let lines = stdin_lines();
    while let Some(batch) = next_batch(&lines)? {
        let predictions = answer(&mut *classifier, &batch)?;
        let text: String =
            batch.iter().zip(&predictions).map(|(line, prediction)| render(line, prediction, as_json)).collect();
        output::print(&text)?;
    }
    Ok(Exit::Ok)
}

fn answer(classifier: &mut dyn Predict, batch: &[String]) -> Result<Vec<Prediction>, Failure> {
    classifier.predict(batch).or_fail(Exit::Negative, "classify")
}

fn render(line: &str, prediction: &Prediction, as_json: bool) -> String {
    if !as_json {
        let score = prediction.scores.first().map_or(f32::NAN, |(_, score)| *score);
        return format!("{}\t{score:.4}\t{line}\n", prediction.label);
    }
    let scores: serde_json::Map<String, serde_json::Value> =
        prediction.scores.iter().map(|(label, score)| (label.clone(), json::float(*score))).collect();
    let document = serde_json::json!({ "line": line, "label": prediction.label, "scores": scores });
    format!("{document}\n")
}

/// Lines as they come: a person at a terminal gets each answer at once, a file is read ahead.
fn stdin_lines() -> Receiver<std::io::Result<String>> {
    let (lines, received) = sync_channel(BATCH_LINES);
    thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    received
}

/// At least one line, and whatever else has come; none at the end.
fn next_batch(lines: &Receiver<std::io::Result<String>>) -> Result<Option<Vec<String>>, Failure> {
    let Ok(first) = lines.recv() else { return Ok(None) };
    let batch: Result<Vec<String>, std::io::Error> =
        std::iter::once(first).chain(lines.try_iter().take(BATCH_LINES - 1)).collect();
    batch.map(Some).or_fail(Exit::Usage, "read standard input as UTF-8 lines")
}
