//! What serving costs, through the `stoke` binary and real HTTP: a language model in one piece and cut over ranks, streams while ranks are killed, and
//! a model that does nothing.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench serving              # all three
//!     cargo bench -p stoke-cli -p stoke-tests --bench serving -- --only noop|cuts|kills
//!     cargo bench -p stoke-cli -p stoke-tests --bench serving -- --load ADDRESS PATH BODY CLIENTS SECONDS
//!
//! The last form loads whatever answers there, and prints a line of JSON: `tests/benches/serving_ray.sh` does so with Ray Serve.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use stoke_tests::local::{LocalCluster, quantile, signal};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

/// Clients of the model that does nothing.
const LOADS: [usize; 3] = [1, 32, 512];
const LOAD_SECONDS: u64 = 5;
/// Streams while ranks are killed, tokens of each, and kills.
const STREAMS: usize = 32;
const STREAM_TOKENS: usize = 100;
const KILLS: usize = 10;
const KILL_EVERY: Duration = Duration::from_secs(3);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let runtime = Runtime::new().expect("a runtime");
    if let [_, address, path, body, clients, seconds] = &args[..] {
        let number = |text: &String| text.parse::<u64>().expect("a number");
        let load = Load { address: address.clone(), path: path.clone(), body: body.clone() };
        let done = runtime.block_on(load.run(number(clients) as usize, Duration::from_secs(number(seconds))));
        return println!("{}", done.json());
    }
    let only = args.iter().position(|arg| arg == "--only").and_then(|at| args.get(at + 1)).map(String::as_str);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned();
    let stoke = stoke_tests::binary::build(&root);
    let spec = root.join("jobs/specs/serve-smollm2.toml");
    for (name, part) in [("noop", noop as fn(&Runtime, &Path, &Path)), ("cuts", cuts), ("kills", kills)] {
        if only.is_none_or(|only| only == name) {
            part(&runtime, &stoke, &spec);
        }
    }
}

/// A job that serves, and the address of a gateway.
fn serve(cluster: &LocalCluster<'_>, spec: &Path, sets: &[&str]) -> (String, String) {
    let mut asked = vec!["serve", spec.to_str().expect("UTF-8")];
    sets.iter().for_each(|set| asked.extend(["--set", set]));
    let served = cluster.ask(&asked);
    let gateway = served["gateways"][0].as_str().expect("a gateway").trim_start_matches("http://").to_owned();
    (served["job"].as_str().expect("a job").to_owned(), gateway)
}

fn noop(runtime: &Runtime, stoke: &Path, spec: &Path) {
    let cluster = LocalCluster::up(stoke, 1, &[]);
    let sets = ["serve.task=infer", "serve.model=identity", "serve.stages=1", "serve.name=noop", "serve.waiting=1024"];
    let (_, address) = serve(&cluster, spec, &sets);
    let body = json!({ "inputs": [{ "name": "x", "datatype": "FP32", "shape": [1], "data": [1.0] }] }).to_string();
    let load = Load { address, path: "/v2/models/noop/infer".into(), body };
    println!("a model that does nothing, {LOAD_SECONDS} s each");
    for clients in LOADS {
        let done = runtime.block_on(load.run(clients, Duration::from_secs(LOAD_SECONDS)));
        println!("  {clients:>4} clients  {}", done.words());
    }
}

fn cuts(runtime: &Runtime, stoke: &Path, spec: &Path) {
    let cluster = LocalCluster::up(stoke, 4, &[]);
    println!("{:<16} {:>12} {:>12} {:>14}", "stages x parts", "1 stream", "8 streams", "first token");
    for (stages, tensor) in [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)] {
        let name = format!("m{stages}x{tensor}");
        let keys = [("stages", stages.to_string()), ("tensor", tensor.to_string()), ("name", name.clone())];
        let sets: Vec<String> = keys.iter().map(|(key, value)| format!("serve.{key}={value}")).collect();
        let sets =
            [sets.iter().map(String::as_str).collect::<Vec<_>>(), vec!["serve.cache=64MiB", "serve.context=1024"]]
                .concat();
        let (job, address) = serve(&cluster, spec, &[sets, vec!["resources.memory=512MiB"]].concat());
        let rate = |streams: usize| {
            let begun = Instant::now();
            let made = runtime.block_on(all_streams(&address, &name, streams, STREAM_TOKENS));
            let tokens: usize = made.iter().map(|made| made.tokens).sum();
            (tokens as f64 / begun.elapsed().as_secs_f64(), made)
        };
        rate(1);
        let ((one, alone), (eight, _)) = (rate(1), rate(8));
        println!(
            "{:<16} {one:>8.0} tok/s {eight:>6.0} tok/s {:>11.0} ms",
            format!("{stages} x {tensor}"),
            alone[0].first_ms
        );
        cluster.ask(&["cancel", &job]);
    }
}

fn kills(runtime: &Runtime, stoke: &Path, spec: &Path) {
    println!("{STREAMS} streams at a time over 2 stages, a rank killed every {} s, both in turn", KILL_EVERY.as_secs());
    for (keep, what) in [("false", "all is computed again"), ("true", "each rank's pages are kept by the other one")] {
        println!("  {what}");
        kills_with(runtime, stoke, (spec, keep));
    }
}

fn kills_with(runtime: &Runtime, stoke: &Path, (spec, keep): (&Path, &str)) {
    let cluster = LocalCluster::up(stoke, 2, &[]);
    let (job, address) = serve(&cluster, spec, &["serve.name=m", &format!("serve.keep={keep}")]);
    let calm = runtime.block_on(all_streams(&address, "m", STREAMS, STREAM_TOKENS));
    let mut pauses = Vec::new();
    let (mut same, mut streams, mut killed) = (0, 0, 0);
    while killed < KILLS {
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let asked = runtime.spawn({
            let address = address.clone();
            async move {
                let made = all_streams(&address, "m", STREAMS, STREAM_TOKENS).await;
                ended.store(true, Ordering::Relaxed);
                made
            }
        });
        let begun = Instant::now();
        let mut next = Duration::from_millis(500);
        while !over.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
            let members = cluster.members(&job);
            if begun.elapsed() >= next && members.len() == 2 {
                signal(members[killed % 2], Signal::KILL);
                (killed, next) = (killed + 1, begun.elapsed() + KILL_EVERY);
            }
        }
        let made = runtime.block_on(asked).expect("the streams");
        streams += made.len();
        same += made.iter().zip(&calm).filter(|(made, calm)| made.text == calm.text).count();
        pauses.extend(made.iter().map(|made| made.pause_ms));
    }
    println!("    {killed} ranks killed, {same} of {streams} answers token-exact");
    let calm: Vec<f64> = calm.iter().map(|made| made.pause_ms).collect();
    for (what, mut values) in [("longest pause of a stream, calm", calm), ("the same, with kills", pauses)] {
        println!(
            "    {what:<34} median {:>6.0} ms  p99 {:>6.0} ms",
            quantile(&mut values, 0.5),
            quantile(&mut values, 0.99)
        );
    }
}

/// One streamed answer.
struct Streamed {
    text: String,
    tokens: usize,
    first_ms: f64,
    /// Between two pieces of text.
    pause_ms: f64,
}

async fn all_streams(address: &str, model: &str, streams: usize, tokens: usize) -> Vec<Streamed> {
    let ask = |number: usize| {
        let (address, model) = (address.to_owned(), model.to_owned());
        tokio::spawn(async move { stream(&address, &model, number, tokens).await })
    };
    let asked: Vec<_> = (0..streams).map(ask).collect();
    let mut made = Vec::new();
    for one in asked {
        made.push(one.await.expect("a stream"));
    }
    made
}

async fn stream(address: &str, model: &str, number: usize, tokens_max: usize) -> Streamed {
    let body = json!({
        "model": model, "prompt": format!("Question {number}: what does a port scan show?\n"), "max_tokens": tokens_max,
        "temperature": if number.is_multiple_of(2) { 0.0 } else { 0.8 }, "seed": number, "stream": true,
        "stream_options": { "include_usage": true },
    });
    let mut connection = BufReader::new(TcpStream::connect(address).await.expect("the gateway listens"));
    let begun = Instant::now();
    connection.write_all(&request(address, "/v1/completions", &body.to_string())).await.expect("a request");
    let (mut text, mut tokens, mut last, mut first_ms, mut pause_ms) = (String::new(), 0, begun, None, 0f64);
    let mut line = String::new();
    while connection.read_line(&mut line).await.expect("the stream goes on") > 0 {
        if let Some(data) = line.trim_end().strip_prefix("data: ") {
            if data == "[DONE]" {
                break;
            }
            let data: Value = serde_json::from_str(data).expect("JSON");
            assert!(data.get("error").is_none(), "{data}");
            tokens = data["usage"]["completion_tokens"].as_u64().map_or(tokens, |made| made as usize);
            if let Some(piece) = data["choices"][0]["text"].as_str().filter(|piece| !piece.is_empty()) {
                let now = Instant::now();
                match first_ms {
                    None => first_ms = Some(millis(now - begun)),
                    Some(_) => pause_ms = pause_ms.max(millis(now - last)),
                }
                last = now;
                text.push_str(piece);
            }
        }
        line.clear();
    }
    Streamed { text, tokens, first_ms: first_ms.unwrap_or(f64::NAN), pause_ms }
}

fn request(address: &str, path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The same request again and again.
#[derive(Clone)]
struct Load {
    address: String,
    path: String,
    body: String,
}

struct Done {
    requests: usize,
    failed: usize,
    seconds: f64,
    median_ms: f64,
    p99_ms: f64,
}

impl Load {
    /// Each client sends its next request when the last one is answered.
    async fn run(&self, clients: usize, time: Duration) -> Done {
        let until = Instant::now() + time;
        let begun = Instant::now();
        let asked: Vec<_> = (0..clients).map(|_| tokio::spawn(self.clone().client(until))).collect();
        let (mut times, mut failed) = (Vec::new(), 0);
        for one in asked {
            let (its, lost) = one.await.expect("a client");
            times.extend(its);
            failed += lost;
        }
        let seconds = begun.elapsed().as_secs_f64();
        let (median_ms, p99_ms) = (quantile(&mut times, 0.5), quantile(&mut times, 0.99));
        Done { requests: times.len(), failed, seconds, median_ms, p99_ms }
    }

    async fn client(self, until: Instant) -> (Vec<f64>, usize) {
        let request = request(&self.address, &self.path, &self.body);
        let (mut times, mut failed) = (Vec::new(), 0);
        let mut connection = BufReader::new(TcpStream::connect(&self.address).await.expect("somebody listens"));
        while Instant::now() < until {
            let begun = Instant::now();
            connection.write_all(&request).await.expect("a request");
            match read_response(&mut connection).await {
                200 => times.push(millis(begun.elapsed())),
                _ => failed += 1,
            }
        }
        (times, failed)
    }
}

/// The status of a response, whose body has a length or comes in chunks.
async fn read_response(connection: &mut BufReader<TcpStream>) -> u16 {
    let (mut line, mut status, mut length, mut is_chunked) = (String::new(), 0, 0, false);
    while connection.read_line(&mut line).await.expect("an answer") > 2 {
        if status == 0 {
            status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        }
        if let Some((name, value)) = line.split_once(':') {
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse().expect("a length");
            }
            is_chunked |= name.eq_ignore_ascii_case("transfer-encoding");
        }
        line.clear();
    }
    let mut body = Vec::new();
    loop {
        if is_chunked {
            line.clear();
            connection.read_line(&mut line).await.expect("a chunk");
            // And the end of its line.
            length = usize::from_str_radix(line.trim(), 16).expect("a length") + 2;
        }
        body.resize(length, 0);
        connection.read_exact(&mut body).await.expect("a body");
        if !is_chunked || length == 2 {
            return status;
        }
    }
}

impl Done {
    fn words(&self) -> String {
        let Self { requests, failed, seconds, median_ms, p99_ms } = self;
        let rate = *requests as f64 / seconds;
        format!("{rate:>7.0} requests/s  median {median_ms:>7.2} ms  p99 {p99_ms:>7.2} ms  {failed} failed")
    }

    fn json(&self) -> Value {
        let Self { requests, failed, seconds, median_ms, p99_ms } = self;
        json!({ "rate": *requests as f64 / seconds, "median_ms": median_ms, "p99_ms": p99_ms, "failed": failed })
    }
}
