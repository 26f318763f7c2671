//! `stoke embed`: a model of this machine turns texts into vectors. Owns what is asked and shown; computes nothing itself.

use std::io::{BufRead, Read};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use stoke_jobs::lm::{Encoder, TEXT_BYTES_MAX};

use crate::Global;
use crate::failure::{Exit, Failure, OrFail};
use crate::{model, output};

const EXAMPLES: &str = "\
Examples:
  python3 jobs/models/fetch.py all-minilm-l6-v2
  stoke embed --model all-minilm-l6-v2 \"CN=*.example.com, O=Example Inc.\"
  stoke embed --model FOLDER < banners.txt > vectors.jsonl
  stoke embed --model FOLDER --json \"one text\" \"another\" | jq -c '.embedding[:3]'";

/// Texts that are computed together: more are not faster, and would wait for each other.
const TEXTS_MAX: usize = 64;
/// Bytes of standard input that are looked at for further lines.
const INPUT_BYTES: usize = 64 << 10;

/// Turn texts into vectors with an embedding model of this machine
///
/// A text is a line of the output: its vector, or with --json an object with the text, its tokens and its vector. The same model and text give the
/// same vector on every machine, whatever texts are beside it.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A folder with config.json, model.safetensors and tokenizer.json as Hugging Face publishes it; or the name of one below ~/.cache/stoke/models (or
    /// $STOKE_MODELS)
    #[arg(long, value_name = "PATH|NAME")]
    model: PathBuf,

    /// The texts; left out or `-`: each line of standard input is one
    texts: Vec<String>,

    /// Compute threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let as_json = global.json;
    // Nothing else runs here.
    tokio::task::spawn_blocking(move || embed(&args, as_json)).await.or_fail(Exit::Negative, "embed")?
}

fn embed(args: &Args, as_json: bool) -> Result<Exit, Failure> {
    let weights = model::open(&args.model)?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads.unwrap_or(0) as usize).build();
    let pool = pool.or_fail(Exit::Negative, "start compute threads")?;
    let mut work = Work {
        encoder: model::encoder(&weights, &args.model)?,
        pool,
        as_json,
        texts: 0,
        tokens: 0,
        time: Duration::ZERO,
    };
    if args.texts.is_empty() || args.texts == ["-"] {
        let mut input = std::io::BufReader::with_capacity(INPUT_BYTES, std::io::stdin().lock());
        loop {
            let texts = lines(&mut input, work.texts)?;
            if texts.is_empty() {
                break;
            }
            work.texts(&texts)?;
        }
    } else {
        args.texts.chunks(TEXTS_MAX).try_for_each(|texts| work.texts(texts))?;
    }
    work.end()
}

/// Lines that are there, and at least one if there is one to come: who writes one and waits for its vector gets it. None at the end.
fn lines(input: &mut std::io::BufReader<impl Read>, before: usize) -> Result<Vec<String>, Failure> {
    let mut texts = Vec::new();
    while texts.len() < TEXTS_MAX && (texts.is_empty() || input.buffer().contains(&b'\n')) {
        let number = before + texts.len() + 1;
        let mut line = Vec::new();
        let read = input.by_ref().take(TEXT_BYTES_MAX as u64 + 2).read_until(b'\n', &mut line);
        if read.or_fail(Exit::Usage, "read texts from standard input")? == 0 {
            break;
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        let refused = |problem: String| Failure::usage(format!("line {number} of standard input {problem}"));
        if line.len() > TEXT_BYTES_MAX {
            return Err(refused(format!("is longer than {TEXT_BYTES_MAX} bytes")).help("cut it, or leave it out"));
        }
        let text = String::from_utf8(line);
        texts.push(text.map_err(|_| refused("is not UTF-8".to_owned()).help("convert it, for example with iconv"))?);
    }
    Ok(texts)
}

/// The model and what was made so far.
struct Work<'w> {
    encoder: Encoder<'w>,
    pool: rayon::ThreadPool,
    as_json: bool,
    texts: usize,
    tokens: usize,
    time: Duration,
}

/// A line with --json.
#[derive(serde::Serialize)]
struct Line<'a> {
    text: &'a str,
    /// With those around the text.
    tokens: usize,
    /// Tokens at its end that the model has no room for.
    tokens_left_out: usize,
    embedding: &'a [f32],
}

impl Work<'_> {
    fn texts(&mut self, texts: &[String]) -> Result<(), Failure> {
        let begun = Instant::now();
        let (mut ids, mut left_out) = (Vec::new(), Vec::new());
        for text in texts {
            let tokens = self.encoder.read(text).or_fail(Exit::Usage, "read a text")?;
            self.tokens += tokens.ids.len();
            ids.push(tokens.ids);
            left_out.push(tokens.left_out);
        }
        let Self { encoder, pool, .. } = self;
        let made = pool.install(|| encoder.encode(&ids));
        self.time += begun.elapsed();
        let mut out = String::new();
        for (at, embedding) in made.iter().enumerate() {
            let (text, tokens, tokens_left_out) = (&texts[at], ids[at].len(), left_out[at]);
            let line = match self.as_json {
                true => serde_json::to_string(&Line { text, tokens, tokens_left_out, embedding }),
                false => serde_json::to_string(embedding),
            };
            out.push_str(&line.or_fail(Exit::Negative, "write a vector")?);
            out.push('\n');
            if tokens_left_out > 0 && !self.as_json {
                let (number, room) = (self.texts + at + 1, self.encoder.config().tokens_max);
                output::say(format_args!(
                    "text {number} is longer than the {room} tokens that the model reads: {tokens_left_out} at its end are left out"
                ));
            }
        }
        self.texts += texts.len();
        output::print(&out)
    }

    fn end(&self) -> Result<Exit, Failure> {
        if self.texts == 0 {
            let help = "write texts after the options, or lines to standard input";
            return Err(Failure::usage("there is no text").help(help));
        }
        if !self.as_json {
            let (texts, tokens, values) = (self.texts, self.tokens, self.encoder.config().hidden);
            let rate = texts as f64 / self.time.as_secs_f64().max(1e-9);
            output::say(format_args!(
                "{texts} texts of {tokens} tokens, {values} values each, at {rate:.0} texts a second"
            ));
        }
        Ok(Exit::Ok)
    }
}
