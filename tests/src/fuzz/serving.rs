//! The corpus of what gateways, heads and stages say to each other.

use stoke_protocol::ids::{Generation, JobId, LogIndex, NodeId, Term};
use stoke_protocol::message::serve::{
    Answer, Ask, Batch, BatchAsk, BatchRow, Datatype, Finish, Generate, Head, Held, Message, PageName, Prompt,
    Question, Refusal, Resume, Route, Routes, Sampling, StageHeader, StagePart, Tensor, TensorKind, Traffic,
};
use stoke_protocol::message::split::{Planned, Split, SplitRank, Survey, Surveyed};
use stoke_protocol::spec::{Precision, Task};

const SAMPLING: Sampling =
    Sampling { temperature: 0.8, top_k: 40, top_p: 0.9, min_p: 0.05, repetition_penalty: 1.1, seed: 7 };

pub fn routes() -> Routes {
    let head = Head { id: super::id(), address: ([127, 0, 0, 1], 4444).into(), generation: Generation(4) };
    let route = |job, head, traffic| {
        let (model, task) = ("m".to_owned(), Task::Generate);
        Route { model, job: JobId(job), task, created_ms: 1, head, revision: job << 40, traffic }
    };
    let routes = [
        route(1, Some(head), Traffic::Rest),
        route(2, None, Traffic::Share { millionths: 100_000 }),
        route(3, None, Traffic::Shadow),
        route(4, None, Traffic::Leaving),
    ];
    Routes { index: LogIndex(9), routes: routes.to_vec().into() }
}

pub fn questions() -> Vec<Question> {
    let message = |role: &str| Message { role: role.into(), content: "hello".into() };
    let generate = |prompt| Generate {
        prompt,
        sampling: SAMPLING,
        tokens_max: Some(16),
        stop: vec!["x".to_owned()].into(),
        answered: vec![1, 2, 3].into(),
    };
    let tensor = Tensor { name: "x".into(), datatype: Datatype::F32, shape: vec![2].into(), values: vec![0; 8].into() };
    let asks = [
        Ask::Generate(generate(Prompt::Chat(vec![message("system"), message("user")].into()))),
        Ask::Generate(generate(Prompt::Text("hello".into()))),
        Ask::Generate(generate(Prompt::Tokens(vec![5, 6].into()))),
        Ask::Embed { texts: vec!["a".to_owned(), "b".to_owned()].into() },
        Ask::Infer { inputs: vec![tensor].into() },
        Ask::Describe,
        Ask::Probe,
    ];
    asks.into_iter().map(|ask| Question { generation: Generation(4), deadline_ms: 500, ask }).collect()
}

pub fn answers() -> Vec<Answer> {
    let kind = TensorKind { name: "x".into(), datatype: Datatype::Bytes, shape: vec![None, Some(3)].into() };
    let outputs = vec![Tensor {
        name: "y".into(),
        datatype: Datatype::Bytes,
        shape: vec![1].into(),
        values: vec![1, 0, 0, 0, 65].into(),
    }];
    vec![
        Answer::Begun { prompt_tokens: 12 },
        Answer::Tokens { index: 3, tokens: vec![8, 9].into(), text: "hi".into() },
        Answer::Vector { index: 0, tokens: 4, values: vec![0.5, -0.5].into() },
        Answer::Tensors { outputs: outputs.into() },
        Answer::Described { inputs: vec![kind.clone()].into(), outputs: vec![kind].into() },
        Answer::Ended { why: Finish::Length, text: "!".into() },
        Answer::Refused(Refusal::Invalid { problem: "no".into() }),
        Answer::Refused(Refusal::TooLong { tokens: 9, context: 8 }),
        Answer::Refused(Refusal::Busy { retry_after_ms: 50 }),
        Answer::Refused(Refusal::Failed { problem: "lost".into() }),
    ]
}

pub fn batch() -> Batch {
    let row = |position| BatchRow { table: 0, token: 17, position };
    let ask = BatchAsk { row: 1, index: 0, sampling: SAMPLING, before: vec![17, 17].into() };
    Batch {
        tables: vec![vec![0, 3].into()].into(),
        rows: vec![row(15), row(16)].into(),
        asks: vec![ask].into(),
        filled: vec![PageName { page: 3, name: [7; 32] }].into(),
    }
}

pub fn headers() -> Vec<StageHeader> {
    let term = Term { generation: Generation(4), ballot: 0 };
    let parts = [StagePart::Batch, StagePart::Hidden, StagePart::Sums { half: 3 }, StagePart::Chosen];
    parts.map(|part| StageHeader { term, batch: 7, part, bytes: 2304 }).into()
}

pub fn held() -> Held {
    let page = |page| PageName { page, name: [page as u8; 32] };
    Held { own: vec![page(0), page(3)].into(), kept: vec![page(3)].into() }
}

pub fn resume() -> Resume {
    let pages = vec![PageName { page: 3, name: [3; 32] }].into();
    Resume { pages, lacking: vec![3].into(), give: Vec::new().into(), copy: vec![3].into() }
}

pub fn survey() -> Survey {
    Survey { model: "m".into(), precision: Precision::Rounded, threads: 2 }
}

pub fn surveyed() -> [Result<Surveyed, String>; 2] {
    let found = Surveyed {
        layers: 30,
        layer_bytes: 3 << 20,
        embedding_bytes: 28 << 20,
        output_bytes: 0,
        kv_heads: 3,
        parts_max: 3,
        token_bytes: 512,
        context: 2048,
        vocabulary: 49_152,
        layer_ns: 200_000,
    };
    [Ok(found), Err("there is no folder /m on this machine".into())]
}

pub fn planned() -> Planned {
    let rank = SplitRank {
        stage: 1,
        part: 0,
        layers: (19, 30),
        memory_bytes: 300 << 20,
        node: NodeId(2),
        layer_ns: 200_000,
        rtt_us: 400,
    };
    let (ranks, why) = (vec![rank].into(), "it does not fit on fewer ranks".into());
    let split = Split { stages: 2, tensor: 1, ranks, token_ns: 8_000_000, stage_ns: 4_000_000, why };
    let nodes = vec![(NodeId(2), "has the model".into())].into();
    Planned { model: "m".into(), split: Some(split), reason: String::new(), nodes }
}
