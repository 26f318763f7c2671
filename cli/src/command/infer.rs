//! `stoke infer`: a language model of this machine answers one prompt, token by token. Owns what is asked and shown; computes nothing itself.

use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use stoke_jobs::lm::engine::{self, Ask, Engine, Limits, Request, Why};
use stoke_jobs::lm::kernels::Cache;
use stoke_jobs::lm::{
    ChatTemplate, Decoder, DecoderConfig, Message, Precision, Sampling, Share, TEXT_BYTES_MAX, Tokenizer, Weights,
    prompt::chat,
};
use stoke_node::probe::free_memory_bytes;

use crate::Global;
use crate::failure::{Exit, Failure, OrFail};
use crate::{model, output};

const EXAMPLES: &str = "\
Examples:
  python3 jobs/models/fetch.py smollm2-135m-instruct
  stoke infer --model smollm2-135m-instruct \"What is a TLS certificate?\"
  stoke infer --model FOLDER --system \"Answer in one word.\" --temperature 0.7 < question.txt
  stoke infer --model FOLDER --raw --json \"HTTP/1.1 200 OK\" | jq -r .text";

/// Rows of a batch: a long prompt is read in parts of so many tokens.
const ROWS_MAX: usize = 256;

/// Answer a prompt with a language model of this machine
///
/// The answer is written as it is made. The same model, prompt and options give the same answer on every machine.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A GGUF file, or a folder with one, or with config.json, safetensors files and tokenizer.json as Hugging Face publishes them; or the name of a
    /// folder below ~/.cache/stoke/models (or $STOKE_MODELS)
    #[arg(long, value_name = "PATH|NAME")]
    model: PathBuf,

    /// The prompt; left out or `-`: read from standard input
    prompt: Option<String>,

    /// What the model is told before the prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,

    /// Continue the prompt as it stands, without the model's chat template
    #[arg(long)]
    raw: bool,

    /// Tokens of the answer at most
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,

    /// Draw tokens, the more evenly the higher; 0 takes the likeliest always
    #[arg(long, value_name = "T", allow_negative_numbers = true, default_value_t = 0.0)]
    temperature: f32,

    /// Draw from so many of the likeliest tokens; 0 from all
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_k: usize,

    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true, default_value_t = 1.0)]
    top_p: f32,

    /// Draw from tokens that are at least this times as likely as the likeliest
    #[arg(long, value_name = "P", allow_negative_numbers = true, default_value_t = 0.0)]
    min_p: f32,

    /// Makes tokens that are there already less likely, above 1
    #[arg(long, value_name = "F", allow_negative_numbers = true, default_value_t = 1.0)]
    repetition_penalty: f32,

    /// The same seed draws the same answer
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Compute threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,

    /// Do not round activations to 8 bits: what the weights give exactly, and several times slower
    #[arg(long)]
    full_precision: bool,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let as_json = global.json;
    // Nothing else runs here.
    tokio::task::spawn_blocking(move || answer(&args, as_json)).await.or_fail(Exit::Negative, "infer")?
}

fn answer(args: &Args, as_json: bool) -> Result<Exit, Failure> {
    let sampling = sampling(args);
    sampling.check().map_err(Failure::usage)?;
    let weights = model::open(&args.model)?;
    let config = model::decoder(&weights, &args.model)?;
    let tokenizer = Tokenizer::open(&weights).or_fail(Exit::Usage, "open the model's tokenizer")?;
    if tokenizer.vocabulary() > config.vocab {
        let (ids, rows) = (tokenizer.vocabulary(), config.vocab);
        let problem = format!("the tokenizer of {} has {ids} tokens, its weights know {rows}", args.model.display());
        return Err(Failure::usage(problem).help("take tokenizer and weights of the same model"));
    }
    let tokens = prompt(args, &weights, &tokenizer)?;
    let whole = tokens.len() + args.max_tokens as usize;
    check_room(&config, tokens.len(), whole)?;
    let precision = if args.full_precision { Precision::Full } else { Precision::Rounded };
    let decoder = Decoder::new(&weights, 0..config.layers, whole, precision, Share::WHOLE);
    let decoder = decoder.or_fail(Exit::Usage, "open the model")?;
    let limits = Limits { running_max: 1, rows_max: ROWS_MAX, batches_max: 1, waiting_max: 1, context: whole };
    let mut engine = Engine::new(decoder, whole.div_ceil(Cache::PAGE) as u32, limits);
    let length = tokens.len();
    let request = Request { id: 0, prompt: tokens, answered: Vec::new(), tokens_max: args.max_tokens as usize };
    let last = tokenizer.end_of_sequence().to_vec();
    engine.submit(Ask { request, sampling, last }).or_fail(Exit::Usage, "ask the model")?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads.unwrap_or(0) as usize).build();
    let answer = engine::Answer::new(&tokenizer, Vec::new(), args.max_tokens as usize);
    let made =
        pool.or_fail(Exit::Negative, "start compute threads")?.install(|| write(&mut engine, answer, as_json))?;
    publish(&made, length, as_json)
}

/// Whether the model knows so long a text, and this machine has the memory for it.
fn check_room(config: &DecoderConfig, prompt: usize, whole: usize) -> Result<(), Failure> {
    let refused =
        |problem: String| Err(Failure::usage(problem).help("shorten the prompt, or ask for less with --max-tokens"));
    if whole > config.context {
        let (answer, context) = (whole - prompt, config.context);
        return refused(format!(
            "the prompt has {prompt} tokens and the answer up to {answer}, more than the {context} that the model was trained for"
        ));
    }
    let page = Cache::page_bytes(config.layers, (config.kv_heads, config.head_size));
    let (needed, free) = ((whole.div_ceil(Cache::PAGE) * page) as u64, free_memory_bytes());
    if needed > free {
        let (needed, free) = (output::bytes(needed), output::bytes(free));
        return refused(format!("keys and values of {whole} tokens take {needed} of memory, and {free} are free"));
    }
    Ok(())
}

fn sampling(args: &Args) -> Sampling {
    let Args { temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = *args;
    Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed }
}

fn prompt(args: &Args, weights: &Weights, tokenizer: &Tokenizer) -> Result<Vec<u32>, Failure> {
    let text = match args.prompt.as_deref() {
        Some(text) if text != "-" => text.to_owned(),
        Some(_) | None => {
            let mut text = String::new();
            let mut input = std::io::stdin().lock().take(TEXT_BYTES_MAX as u64 + 1);
            input.read_to_string(&mut text).or_fail(Exit::Usage, "read the prompt from standard input")?;
            text
        }
    };
    let tokens = if args.raw {
        tokenizer.encode_framed(&text)
    } else {
        let message = |role: &str, content: &str| Message { role: role.to_owned(), content: content.to_owned() };
        let system = args.system.iter().map(|text| message("system", text));
        let messages: Vec<Message> = system.chain([message("user", text.trim_end())]).collect();
        let template = ChatTemplate::open(weights).or_fail(Exit::Usage, "read the model's chat template");
        let template = template.map_err(|failure| failure.help("--raw continues the prompt without one"))?;
        chat(&template, tokenizer, &messages)
    };
    let tokens = tokens.or_fail(Exit::Usage, "read the prompt")?;
    if tokens.is_empty() {
        return Err(Failure::usage("the prompt is empty").help("write one after the options, or to standard input"));
    }
    Ok(tokens)
}

/// The answer and how it came.
struct Answer {
    text: String,
    tokens: u32,
    /// It was the model that ended it.
    ended: bool,
    /// Until the first token, and from then on.
    first: Duration,
    rest: Duration,
}

/// Until the model or the limit ends the answer. Shows text as it comes.
fn write(engine: &mut Engine<'_>, mut answer: engine::Answer, as_json: bool) -> Result<Answer, Failure> {
    let (begun, mut came) = (Instant::now(), None);
    let (mut text, mut tokens) = (String::new(), 0);
    let mut add = |piece: String| {
        text.push_str(&piece);
        show(&piece, as_json)
    };
    while engine.load() != (0, 0) {
        for made in engine.step() {
            came.get_or_insert_with(Instant::now);
            tokens += 1;
            add(answer.push(made.token).text)?;
        }
    }
    add(answer.finish())?;
    let (came, ended) = (came.unwrap_or(begun), answer.over() == Some(Why::End));
    Ok(Answer { text, tokens, ended, first: came - begun, rest: came.elapsed() })
}

fn show(piece: &str, as_json: bool) -> Result<(), Failure> {
    if as_json || piece.is_empty() { Ok(()) } else { output::print(piece) }
}

fn publish(answer: &Answer, prompt: usize, as_json: bool) -> Result<Exit, Failure> {
    let Answer { text, tokens, ended, first, rest } = answer;
    let rate = |count: usize, time: &Duration| count as f64 / time.as_secs_f64().max(1e-9);
    let (read, made) = (rate(prompt, first), rate(tokens.saturating_sub(1) as usize, rest));
    if as_json {
        output::print_json(&serde_json::json!({
            "text": text,
            "finish_reason": if *ended { "stop" } else { "length" },
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "first_token_seconds": first.as_secs_f64(),
            "prompt_tokens_per_second": read,
            "tokens_per_second": made,
        }))?;
    } else {
        let newline = if text.ends_with('\n') { "" } else { "\n" };
        output::print(newline)?;
        let cut = if *ended { "" } else { ", cut off by --max-tokens" };
        output::say(format_args!(
            "{prompt} tokens read at {read:.0} a second, {tokens} made at {made:.0} a second{cut}"
        ));
    }
    Ok(Exit::Ok)
}
