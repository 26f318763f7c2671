//! The first rank of a serving gang: questions become requests, plans become batches, and tokens go back to those who asked. Owns the requests from
//! one generation to the next; what is in a batch is the engine's, and how it is computed the worker's.
//!
//! B8: as many batches are under way as there are stages, so that all of them compute. B9: a request that was being computed when a rank was
//! lost, five times without a token in between, is given up: it may be what they die of.

use std::collections::BTreeMap;

use stoke_jobs::lm::Sampling;
use stoke_jobs::lm::engine::{self, Limits, Refused, Request};
use stoke_protocol::ids::{Generation, Step};
use stoke_protocol::message::rank::{Membership, RankEvent};
use stoke_protocol::message::serve::{Refusal, StagePart};
use stoke_protocol::spec::Serve;
use tokio::sync::mpsc::UnboundedSender;

use super::generating::{Asked, Said};
use super::kept::Worth;
use super::links::Frame;
use super::model::{Model, Words};
use super::stage::{ROWS_MAX, Worker};
use super::{Event, Gone, Post};
use crate::worker::{Told, text_of};

/// B9.
const LOSSES_MAX: u32 = 5;
/// The number of the request that shows that all ranks of a generation compute; no question has it.
const PROOF: u64 = 0;
/// What who is refused is told to wait.
const RETRY_AFTER_MS: u32 = 1_000;

pub struct Head {
    requests: engine::Head,
    open: BTreeMap<u64, Open>,
    /// Tokens that end every answer.
    ends: Vec<u32>,
    stages: usize,
    /// The generation is to be told of when its first batch is there.
    unproven: Option<Generation>,
    /// The generation that it led last, and the requests that were computed at its end.
    led: Option<Generation>,
    at_risk: Vec<u64>,
}

/// Somebody who waits for an answer.
struct Open {
    reply: UnboundedSender<Said>,
    /// Of the next token.
    index: u64,
    /// Since the last one.
    losses: u32,
}

impl Head {
    pub fn new(serve: &Serve, model: &Model, words: &Words) -> Self {
        let limits = Limits {
            running_max: serve.running as usize,
            rows_max: ROWS_MAX as usize,
            // The proof's place, and those of the door.
            waiting_max: 1 + (serve.running + serve.waiting) as usize,
            batches_max: serve.stages() as usize,
            context: model.context,
        };
        let (requests, ends) = (engine::Head::new(model.pages, limits), words.tokenizer.end_of_sequence().to_vec());
        Self {
            requests,
            open: BTreeMap::new(),
            ends,
            stages: serve.stages() as usize,
            unproven: None,
            led: None,
            at_risk: Vec::new(),
        }
    }

    /// Leads a generation to its end.
    pub fn lead(&mut self, post: &Post<'_>, worker: &mut Worker<'_>, membership: &Membership) -> Gone {
        let generation = membership.generation;
        let before = self.led.replace(generation);
        if before != membership.after {
            // Somebody was lost in between.
            self.strike();
        }
        // Its own requests, as far as it has had any.
        let worth = if before.is_some() { Worth::Names(self.requests.names()) } else { worker.newest() };
        let kept = match worker.resume(post, Some(worth)) {
            Ok(kept) => kept,
            Err(gone) => return gone,
        };
        self.requests.reset(&kept);
        self.unproven = Some(generation);
        self.prove();
        loop {
            let Err(gone) = self.turn(post, worker) else { continue };
            let at_risk = self.open.keys().copied().filter(|id| self.requests.runs(*id));
            self.at_risk = at_risk.collect();
            return gone;
        }
    }

    /// A request of one token, so that the gang is known to compute before anybody asks.
    fn prove(&mut self) {
        self.requests.cancel(PROOF);
        let request = Request { id: PROOF, prompt: vec![0], answered: Vec::new(), tokens_max: 1 };
        // One that is refused has others before it, which prove as much.
        let _full = self.requests.submit(engine::Ask { request, sampling: Sampling::default(), last: Vec::new() });
    }

    fn turn(&mut self, post: &Post<'_>, worker: &mut Worker<'_>) -> Result<(), Gone> {
        while let Some(event) = worker.event(post, false)? {
            self.take(post, event)?;
        }
        let (_waiting, running) = self.requests.load();
        post.meter.computes(running);
        if self.requests.under_way() < self.stages
            && let Some(batch) = self.requests.plan()
        {
            return match worker.begin(post, &batch)? {
                Some(tokens) => self.computed(post, batch.number, &tokens),
                None => Ok(()),
            };
        }
        let event = worker.event(post, true)?.ok_or(Gone::Left)?;
        self.take(post, event)
    }

    fn take(&mut self, post: &Post<'_>, event: Event) -> Result<(), Gone> {
        match event {
            Event::Asked(asked) => self.asked(*asked),
            Event::Dropped(number) => {
                self.open.remove(&number);
                self.requests.cancel(number);
            }
            Event::Frame(Frame { from, header, bytes, .. }) => {
                let (tokens, rest) = bytes.as_chunks::<4>();
                let last = (post.spot.stages - 1) * post.spot.tensor;
                if from != last || header.part != StagePart::Chosen || !rest.is_empty() {
                    let problem = format!("batch {}: {:?} where tokens were due", header.batch, header.part);
                    return Err(Gone::Failed(problem));
                }
                let tokens: Vec<u32> = tokens.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
                self.computed(post, header.batch, &tokens)?;
            }
            // The worker ends on those.
            Event::Lost { .. } | Event::Left { .. } | Event::Superseded(_) | Event::Given(_) => {}
        }
        Ok(())
    }

    fn asked(&mut self, asked: Asked) {
        let Asked { number, prompt, answered, tokens_max, sampling, reply } = asked;
        let open = Open { reply, index: answered.len() as u64, losses: 0 };
        let request = Request { id: number, prompt, answered, tokens_max };
        match self.requests.submit(engine::Ask { request, sampling, last: self.ends.clone() }) {
            Ok(()) => drop(self.open.insert(number, open)),
            Err(refused) => open.refuse(match refused {
                Refused::Busy { .. } => Refusal::Busy { retry_after_ms: RETRY_AFTER_MS },
                Refused::Nothing => Refusal::Invalid { problem: text_of(&Refused::Nothing) },
                Refused::TooLong { tokens, room } => Refusal::TooLong { tokens: tokens as u32, context: room as u32 },
            }),
        }
    }

    fn computed(&mut self, post: &Post<'_>, number: u64, tokens: &[u32]) -> Result<(), Gone> {
        let made = self.requests.computed(number, tokens).map_err(|error| Gone::Failed(text_of(&error)))?;
        if let Some(generation) = self.unproven.take() {
            (post.tell)(Told::Event(RankEvent::Resumed { generation, step: Step(generation.0) }));
        }
        for made in made {
            let Some(open) = self.open.get_mut(&made.id) else { continue };
            open.losses = 0;
            // Whoever does not listen any more says so.
            let _ = open.reply.send(Said::Token { index: open.index, token: made.token, over: made.over });
            open.index += 1;
            if made.over {
                self.open.remove(&made.id);
            }
        }
        Ok(())
    }

    /// B9.
    fn strike(&mut self) {
        for id in std::mem::take(&mut self.at_risk) {
            let Some(open) = self.open.get_mut(&id) else { continue };
            open.losses += 1;
            if open.losses >= LOSSES_MAX {
                let problem =
                    format!("the ranks that computed it were lost {LOSSES_MAX} times before its next token was there");
                open.refuse(Refusal::Failed { problem });
                self.open.remove(&id);
                self.requests.cancel(id);
            }
        }
    }
}

impl Open {
    fn refuse(&self, refusal: Refusal) {
        let _ = self.reply.send(Said::Refused(refusal));
    }
}
