//! `stoke predict`: a trained classifier on lines from standard input.

use std::io::BufRead;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use stoke_jobs::Prediction;
use stoke_node::checkpoint as store;

use super::checkpoint::{self, Located};
use crate::Global;
use crate::failure::{Exit, Failure, OrFail};
use crate::{json, output};

const EXAMPLES: &str = "\
Examples:
  echo secure-login-paypa1.com | stoke predict --checkpoint FOLDER
  stoke predict --checkpoint job-3 --json < domains.txt
  zcat jobs/data/digits.jsonl.gz | head -3 | stoke predict --checkpoint FOLDER | cut -f1,2";

/// Lines that wait for the model; more would only cost memory.
const BATCH_LINES: usize = 256;

/// Classify lines from standard input: label, probability and the line, tab-separated
///
/// What a line is depends on the trainer: for domains a domain name, for digits a JSON array of 784 values of 0..255 or a row of a JSONL file
/// to train on. Blank lines are passed over. A line that cannot be read is named on standard error (with --json also in its place on standard
/// output), the others are answered, and the exit code is 1.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A checkpoint's folder or URI (file://, s3://, az://), or a job (its newest checkpoint)
    #[arg(long, value_name = "CHECKPOINT|JOB")]
    checkpoint: String,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let found = checkpoint::locate(&args.checkpoint, global).await?;
    let as_json = global.json;
    // Reading and computing block, and nothing else runs here.
    tokio::task::spawn_blocking(move || classify(&found, as_json)).await.or_fail(Exit::Negative, "predict")?
}

/// A line that cannot be classified is told of, and costs no other line its answer.
fn classify(Located { uri, manifest_blake3 }: &Located, as_json: bool) -> Result<Exit, Failure> {
    let (manifest, tensors) = store::load(uri, *manifest_blake3).map_err(|error| checkpoint::failure(error, uri))?;
    let mut classifier = stoke_jobs::classifier(&manifest.spec, &manifest.trainer, tensors)
        .or_fail(Exit::Negative, format!("build the {} model of {uri}", manifest.trainer))?;
    let (lines, mut bad) = (stdin_lines(), 0u64);
    while let Some(batch) = next_batch(&lines)? {
        let texts: Vec<&str> = batch.iter().map(|(_, text)| text.as_str()).collect();
        let (mut answers, mut problems) = (String::new(), String::new());
        for ((number, text), answer) in batch.iter().zip(classifier.predict(&texts)) {
            match answer {
                Ok(prediction) => answers.push_str(&render(text, &prediction, as_json)),
                Err(problem) => {
                    bad += 1;
                    problems.push_str(&format!("error: input line {number}: {problem}\n"));
                    if as_json {
                        let error = serde_json::json!({ "input_line": number, "message": problem });
                        answers.push_str(&format!("{}\n", serde_json::json!({ "line": text, "error": error })));
                    }
                }
            }
        }
        output::print(&answers)?;
        if !problems.is_empty() {
            output::say(problems.trim_end());
        }
    }
    Ok(if bad == 0 { Exit::Ok } else { Exit::Negative })
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

/// A line with its number, from 1.
type Line = (u64, std::io::Result<String>);

/// Lines as they come: a person at a terminal gets each answer at once, a file is read ahead. Blank lines are counted and passed over.
fn stdin_lines() -> Receiver<Line> {
    let (lines, received) = sync_channel(BATCH_LINES);
    thread::spawn(move || {
        for (number, line) in (1..).zip(std::io::stdin().lock().lines()) {
            let blank = line.as_ref().is_ok_and(|line| line.trim().is_empty());
            if !blank && lines.send((number, line)).is_err() {
                return;
            }
        }
    });
    received
}

/// At least one line, and whatever else has come; none at the end.
fn next_batch(lines: &Receiver<Line>) -> Result<Option<Vec<(u64, String)>>, Failure> {
    let Ok(first) = lines.recv() else { return Ok(None) };
    let batch = std::iter::once(first).chain(lines.try_iter().take(BATCH_LINES - 1));
    let read = |(number, line): Line| Ok((number, line.or_fail(Exit::Usage, format!("read input line {number}"))?));
    batch.map(read).collect::<Result<_, Failure>>().map(Some)
}
