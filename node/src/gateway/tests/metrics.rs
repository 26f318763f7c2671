//! What a gateway tells of itself: to Prometheus, and to the coordinator.

use stoke_protocol::message::load::Demand;

use super::*;

fn lines(text: &str) -> Vec<&str> {
    text.lines().filter(|line| !line.starts_with('#') && !line.contains("_bucket") && !line.contains("_sum")).collect()
}

#[tokio::test]
async fn answers_refusals_and_replays_are_counted_by_model() {
    let busy = Deed::Refuse(Refusal::Busy { retry_after_ms: 50 });
    let (_cluster, _head, gateway) = with_head(vec![Deed::Close(5), Deed::Answer, busy]).await;
    assert_eq!(post(&gateway, CHAT, chat(12, true)).await.status, 200);
    assert_eq!(post(&gateway, CHAT, chat(12, false)).await.status, 429);
    let other = json!({"model": "made-up", "messages": [{"role": "user", "content": "hello"}]});
    assert_eq!(post(&gateway, CHAT, other).await.status, 404);
    assert_eq!(get(&gateway, "/v2/models/m/ready").await.status, 200, "a probe is no question of a client");
    let response = get(&gateway, "/metrics").await;
    assert!(response.header("content-type").starts_with("text/plain; version=0.0.4"));
    let of = |name: &str, value: u64| format!("stoke_gateway_model_{name}{{model=\"m\"}} {value}");
    let model = [
        of("questions_total", 2),
        of("answers_total", 1),
        of("tokens_total", 12),
        of("busy_total", 1),
        of("no_head_total", 0),
        of("replays_total", 1),
        of("running", 0),
        of("waiting", 0),
        of("first_token_seconds_count", 1),
    ];
    let (all, of_models) = (lines(&response.text), |line: &&str| line.contains("_model_"));
    assert_eq!(all.iter().copied().filter(of_models).collect::<Vec<_>>(), model);
    assert!(
        all.contains(&"stoke_gateway_requests_total 5") && all.contains(&"stoke_gateway_refused_total 2"),
        "{all:?}"
    );
    let demand = |refused| vec![Demand { model: "m".into(), held: 0, refused }];
    assert_eq!((gateway.watch().demand(), gateway.watch().demand()), (demand(1), Vec::new()));
}

#[tokio::test]
async fn the_coordinator_is_told_of_questions_that_wait_for_a_head() {
    let cluster = Cluster::new();
    let head = cluster.head(1, 1, Vec::new());
    let gateway = cluster.gateway(|options| options.wait = LONG).await;
    gateway.routes(routes(1, vec![Route { head: None, ..head.route("m", Task::Generate) }]));
    let asking = post(&gateway, CHAT, chat(3, false));
    let coming = async {
        let held = loop {
            let demand = gateway.watch().demand();
            if !demand.is_empty() {
                break demand;
            }
            tokio::task::yield_now().await;
        };
        gateway.routes(routes(2, vec![head.route("m", Task::Generate)]));
        held
    };
    let (response, held) = tokio::join!(asking, coming);
    assert_eq!((response.status, held), (200, vec![Demand { model: "m".into(), held: 1, refused: 0 }]));
    assert_eq!(gateway.watch().demand(), []);
    // Models that are gone are forgotten.
    gateway.routes(routes(3, Vec::new()));
    assert!(!get(&gateway, "/metrics").await.text.contains("model=\"m\""));
}
