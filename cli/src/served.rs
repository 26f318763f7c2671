//! What people and programs read of a job that serves: its replicas, what it has under way and how fast it is. Asks nothing and decides nothing.

use stoke_protocol::message::client::{JobView, LoadView, ScaleView, ServesView};
use stoke_protocol::spec::Precision;

use crate::json;
use crate::output::{self, Table, grouped};

/// A few lines; none for a job that trains.
pub fn lines(job: &JobView) -> String {
    let Some(serves) = &job.serves else { return String::new() };
    let mut table = Table::bare();
    let precision = if serves.precision == Precision::Full { ", in full precision" } else { "" };
    let answers = match (job.state.is_terminal(), serves.ready) {
        (true, _) => "",
        (false, true) => ", it answers",
        (false, false) => ", it does not answer",
    };
    table.row(["serves".into(), format!("{} from {}{precision}{answers}", serves.model, serves.weights)]);
    if job.state.is_terminal() {
        return table.render();
    }
    let places: Vec<String> = job.placement.iter().map(|(rank, node)| format!("{rank} on {node}")).collect();
    if !places.is_empty() {
        table.row(["ranks".into(), places.join(", ")]);
    }
    if let Some(traffic) = job.traffic {
        table.row(["requests".into(), json::traffic_words(traffic)]);
    }
    table.row(["replicas".into(), replicas(serves)]);
    let here = match &serves.load {
        Some(load) => format!("{} running, {} waiting", load.running, load.waiting),
        None => "its head was not heard in the last seconds".into(),
    };
    table.row(["now".into(), format!("{here}; at gateways {} of {} wait for a head", serves.held, serves.model)]);
    if let Some(load) = &serves.load {
        table.row(["speed".into(), speed(load)]);
        let (answers, tokens) = (output::count(load.answers, "answer"), output::count(load.tokens, "token"));
        table.row(["done".into(), format!("{answers}, {tokens}")]);
    }
    table.render()
}

fn replicas(serves: &ServesView) -> String {
    let ServesView { replicas, answering, scale, .. } = serves;
    let all = format!("{replicas}, {answering} answer");
    let Some(ScaleView { min, max, requests, first_token_ms }) = scale else { return all };
    let target = first_token_ms.map(|ms| format!(" and first tokens within {} ms", grouped(ms))).unwrap_or_default();
    format!("{all}; scales itself between {min} and {max}, for {} each{target}", output::count(*requests, "request"))
}

fn speed(load: &LoadView) -> String {
    let tokens = format!("{:.1} tokens/s", load.tokens_per_second);
    match (load.first_token_p50_ms, load.first_token_p99_ms) {
        (Some(p50), Some(p99)) => format!("{tokens}; first token p50 {p50} ms, p99 {p99} ms (of the last 10 s)"),
        (None, _) | (_, None) => format!("{tokens}; no answer began in the last 10 s"),
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::spec::Task;

    use super::*;

    #[test]
    fn replicas_say_by_which_bounds_they_come_and_go() {
        let scale = ScaleView { min: 1, max: 4, requests: 16, first_token_ms: Some(2_000) };
        let serves = ServesView {
            model: "m".into(),
            task: Task::Generate,
            weights: "/m".into(),
            precision: Precision::Rounded,
            ready: true,
            load: None,
            replicas: 3,
            answering: 2,
            held: 0,
            scale: Some(scale),
        };
        assert_eq!(
            replicas(&serves),
            "3, 2 answer; scales itself between 1 and 4, for 16 requests each and first tokens within 2,000 ms"
        );
        assert_eq!(replicas(&ServesView { scale: None, ..serves }), "3, 2 answer");
    }
}
