//! Several revisions of a model behind one gateway: shares, shadows, and answers that go on where they began.

use stoke_protocol::message::serve::Traffic;

use super::*;

fn revised(head: &TestHead, revision: u64, traffic: Traffic) -> Route {
    Route { revision, traffic, ..head.route("m", Task::Generate) }
}

/// A gateway in front of a regular head and another one.
async fn beside(cluster: &Cluster, heads: [&TestHead; 2], traffic: Traffic) -> Gateway {
    let gateway = cluster.gateway(|options| options.silence = LONG).await;
    let [regular, other] = heads;
    gateway.routes(routes(1, vec![revised(regular, 1, Traffic::Rest), revised(other, 2, traffic)]));
    gateway
}

/// G7: as in the table, and the two revisions are all that answers.
#[tokio::test]
async fn a_canary_gets_its_share_of_a_thousand_requests() {
    let cluster = Cluster::new();
    let (regular, canary) = (cluster.head(1, 1, Vec::new()), cluster.head(2, 1, Vec::new()));
    let gateway = beside(&cluster, [&regular, &canary], Traffic::Share { millionths: 100_000 }).await;
    // Ten requests of a hundred choices would be one hundred questions: requests of 16 are 16 draws.
    for _ in 0..62 {
        let body = json!({"model": "m", "prompt": "x", "n": 16, "max_tokens": 1});
        assert_eq!(post(&gateway, "/v1/completions", body).await.status, 200);
    }
    let body = json!({"model": "m", "prompt": "x", "n": 8, "max_tokens": 1});
    assert_eq!(post(&gateway, "/v1/completions", body).await.status, 200);
    let (regular, canary) = (regular.questions().len(), canary.questions().len());
    assert!(regular + canary == 1_000 && (95..=105).contains(&canary), "{regular} {canary}");
}

/// The first four tokens of an answer are there.
async fn begun(gateway: &Gateway) {
    while gateway.counts().tokens < 4 {
        tokio::task::yield_now().await;
    }
}

/// G9: it waits for a head of its own revision, however many of others there are.
#[tokio::test]
async fn an_answer_goes_on_at_its_own_revision_only() {
    let cluster = Cluster::new();
    let (first, other) = (cluster.head(1, 1, vec![Deed::Stall(4)]), cluster.head(2, 1, Vec::new()));
    // All of its questions: the regular one gets none but when the other cannot.
    let gateway = beside(&cluster, [&first, &other], Traffic::Share { millionths: 1 }).await;
    let asking = post(&gateway, CHAT, chat(12, true));
    let failing = async {
        begun(&gateway).await;
        let leaving = |head| Route { head, ..revised(&first, 1, Traffic::Leaving) };
        gateway.routes(routes(2, vec![leaving(Some(first.head())), revised(&other, 2, Traffic::Rest)]));
        assert_eq!(gateway.watch().leaving(), (stoke_protocol::ids::LogIndex(2), 1));
        first.die().await;
        first.stopped(1).await;
        gateway.routes(routes(3, vec![leaving(None), revised(&other, 2, Traffic::Rest)]));
        // New questions have somewhere to go, and the old one keeps its job from leaving.
        assert_eq!(post(&gateway, CHAT, chat(2, false)).await.json()["choices"][0]["message"]["content"], expected(2));
        assert_eq!(gateway.watch().leaving(), (stoke_protocol::ids::LogIndex(3), 1));
        let next = cluster.head(1, 2, Vec::new());
        gateway.routes(routes(4, vec![revised(&next, 1, Traffic::Leaving), revised(&other, 2, Traffic::Rest)]));
        next
    };
    let (response, next) = tokio::join!(asking, failing);
    assert_eq!(read_stream(&response.text), (expected(12), "length".into(), usage(12)));
    assert_eq!((next.answered().len(), other.answered()), (1, vec![0]));
    assert_eq!(gateway.watch().leaving(), (stoke_protocol::ids::LogIndex(4), 0));
}

#[tokio::test]
async fn an_answer_whose_revision_is_gone_ends_with_an_error() {
    let cluster = Cluster::new();
    let (first, other) = (cluster.head(1, 1, vec![Deed::Stall(4)]), cluster.head(2, 1, Vec::new()));
    let gateway = beside(&cluster, [&first, &other], Traffic::Share { millionths: 1 }).await;
    let asking = post(&gateway, CHAT, chat(12, false));
    let failing = async {
        begun(&gateway).await;
        gateway.routes(routes(2, vec![revised(&other, 2, Traffic::Rest)]));
        first.die().await;
    };
    let (response, ()) = tokio::join!(asking, failing);
    assert_eq!((response.status, response.header("retry-after")), (503, "1"), "{}", response.text);
    assert_eq!(response.json()["error"]["code"], "model_not_ready");
    assert!(response.message().contains("by the revision that began this answer"), "{}", response.text);
    assert_eq!(other.questions().len(), 0);
}

/// A question of which nothing is answered yet may go anywhere.
#[tokio::test]
async fn a_question_that_has_no_answer_yet_goes_to_any_revision() {
    let cluster = Cluster::new();
    let (first, other) = (cluster.head(1, 1, vec![Deed::Refuse(Refusal::Moved)]), cluster.head(2, 1, Vec::new()));
    let gateway = beside(&cluster, [&first, &other], Traffic::Share { millionths: 1 }).await;
    let response = post(&gateway, CHAT, chat(3, false)).await;
    assert_eq!(response.json()["choices"][0]["message"]["content"], expected(3));
    assert_eq!((first.questions().len(), other.questions().len()), (1, 1));
}

/// G8: whatever becomes of the copies.
#[tokio::test]
async fn a_shadow_that_dies_hangs_or_is_busy_costs_the_client_nothing() {
    let cluster = Cluster::new();
    let deeds = [
        Deed::Answer,
        Deed::Close(2),
        Deed::Reset(0),
        Deed::End(1),
        Deed::Stall(1),
        Deed::Repeat(3),
        Deed::Refuse(Refusal::Busy { retry_after_ms: 60_000 }),
        Deed::Refuse(Refusal::Invalid { problem: "no".into() }),
    ];
    for deed in deeds {
        let (regular, shadow) = (cluster.head(1, 1, Vec::new()), cluster.head(2, 1, vec![deed.clone()]));
        let gateway = beside(&cluster, [&regular, &shadow], Traffic::Shadow).await;
        let response = post(&gateway, CHAT, chat(12, true)).await;
        assert_eq!(read_stream(&response.text), (expected(12), "length".into(), usage(12)), "{deed:?}");
        shadow.asked(1).await;
        let copy = shadow.questions().remove(0);
        assert_eq!(copy.ask, regular.questions()[0].ask, "{deed:?}");
        let counts = gateway.counts();
        assert_eq!((counts.replays, counts.broken, counts.tokens, counts.copies), (0, 0, 12, 1), "{deed:?}");
        if !matches!(deed, Deed::Answer | Deed::Stall(_) | Deed::Repeat(_)) {
            while gateway.counts().copies_failed == 0 {
                tokio::task::yield_now().await;
            }
        }
        let response = post(&gateway, CHAT, chat(2, false)).await;
        assert_eq!(response.json()["choices"][0]["message"]["content"], expected(2), "{deed:?}");
        if matches!(deed, Deed::Refuse(Refusal::Busy { .. })) {
            assert_eq!(gateway.counts().copies, 1, "a busy shadow is left alone");
        }
    }
}

#[tokio::test]
async fn a_shadow_is_asked_so_much_at_a_time_and_no_more() {
    let cluster = Cluster::new();
    let (regular, shadow) = (cluster.head(1, 1, Vec::new()), cluster.head(2, 1, vec![Deed::Stall(0); 64]));
    let gateway = beside(&cluster, [&regular, &shadow], Traffic::Shadow).await;
    for _ in 0..40 {
        assert_eq!(post(&gateway, CHAT, chat(1, false)).await.status, 200);
    }
    assert_eq!((gateway.counts().copies, gateway.counts().running), (32, 0));
    // A client that goes takes the copy back too.
    let shadow = cluster.head(3, 1, vec![Deed::Stall(1)]);
    let regular = cluster.head(4, 1, vec![Deed::Stall(1)]);
    gateway.routes(routes(2, vec![revised(&regular, 1, Traffic::Rest), revised(&shadow, 2, Traffic::Shadow)]));
    tokio::select! {
        _ = post(&gateway, CHAT, chat(12, true)) => panic!("a head that stalls has answered"),
        () = async { tokio::join!(regular.asked(1), shadow.asked(1)); } => {}
    }
    tokio::join!(regular.stopped(1), shadow.stopped(1));
}

#[tokio::test]
async fn each_job_of_a_model_says_whether_it_answers() {
    let cluster = Cluster::new();
    let (regular, shadow) = (cluster.head(1, 1, Vec::new()), cluster.head(2, 1, Vec::new()));
    let gateway = beside(&cluster, [&regular, &shadow], Traffic::Shadow).await;
    for (path, status, asked) in [
        ("/v2/models/m/versions/job-1/ready", 200, [1, 0]),
        ("/v2/models/m/versions/job-2/ready", 200, [1, 1]),
        ("/v2/models/m/versions/job-3/ready", 404, [1, 1]),
        ("/v2/models/z/versions/job-1/ready", 404, [1, 1]),
    ] {
        assert_eq!(get(&gateway, path).await.status, status, "{path}");
        assert_eq!([&regular, &shadow].map(|head| head.questions().len()), asked, "{path}");
    }
}
