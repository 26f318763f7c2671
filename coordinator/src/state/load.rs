//! What heads and gateways say of models that are served. Owns the newest of it, the rates over a few seconds and the sums; what follows is
//! `autoscale.rs`'s. Volatile: a restart hears everybody anew.
//!
//! W1: what was said [`FRESH_MS`] ago counts for nothing. W2: a head counts from zero when its process begins; the sums of a model never fall.

use std::collections::{BTreeMap, VecDeque};

use stoke_protocol::ids::{JobId, NodeId};
use stoke_protocol::message::client::LoadView;
use stoke_protocol::message::load::{Demand, FirstTokens, Load};
use stoke_protocol::message::rank::RankId;

use super::control::{Control, SessionId, Step};
use super::effect::Effect;
use super::time::Mono;

/// Heads and gateways speak every second: five words may be lost.
const FRESH_MS: u64 = 5_000;
/// Over which rates are measured.
const RATE_MS: u64 = 10_000;
/// Words of a head that are kept for that; one that speaks more often has a shorter memory.
const WORDS_MAX: usize = 32;
/// Models of one gateway's word.
const DEMANDS_MAX: usize = 1_000;

#[derive(Clone, Default, Debug)]
pub struct Loads {
    heads: BTreeMap<JobId, Heard>,
    gateways: BTreeMap<NodeId, (Mono, Vec<Demand>)>,
    /// Of each model, since this coordinator has started.
    totals: BTreeMap<String, Total>,
}

#[derive(Clone, Debug)]
struct Heard {
    id: RankId,
    /// Newest last; never empty.
    words: VecDeque<(Mono, Load)>,
}

/// What a model's heads have done.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Total {
    pub answers: u64,
    pub tokens: u64,
    /// Questions that gateways refused.
    pub refused: u64,
    pub first_tokens: FirstTokens,
}

impl Loads {
    /// The head of a job speaks.
    pub fn hear(&mut self, now: Mono, id: RankId, model: &str, load: Load) {
        let heard = self.heads.entry(id.job).or_insert_with(|| Heard { id, words: VecDeque::new() });
        if heard.id != id {
            *heard = Heard { id, words: VecDeque::new() };
        }
        let before = heard.words.back().map(|(_, load)| *load).unwrap_or_default();
        heard.words.push_back((now, load));
        let old = |(at, _): &(Mono, Load)| now.since_ms(*at) > RATE_MS;
        while heard.words.len() > WORDS_MAX || heard.words.len() > 1 && heard.words.front().is_some_and(old) {
            heard.words.pop_front();
        }
        // W2.
        let total = self.totals.entry(model.to_owned()).or_default();
        total.answers = total.answers.saturating_add(load.answers.saturating_sub(before.answers));
        total.tokens = total.tokens.saturating_add(load.tokens.saturating_sub(before.tokens));
        total.first_tokens.merge(&load.first_tokens.since(&before.first_tokens));
    }

    /// A node's gateway speaks. `is_served`: others are not kept.
    pub fn demand(&mut self, now: Mono, node: NodeId, demands: Vec<Demand>, is_served: impl Fn(&str) -> bool) {
        let kept: Vec<Demand> =
            demands.into_iter().take(DEMANDS_MAX).filter(|demand| is_served(&demand.model)).collect();
        for demand in &kept {
            let total = self.totals.entry(demand.model.clone()).or_default();
            total.refused = total.refused.saturating_add(demand.refused.into());
        }
        match kept.is_empty() {
            true => drop(self.gateways.remove(&node)),
            false => drop(self.gateways.insert(node, (now, kept))),
        }
    }

    /// The last word of a job's head.
    pub fn of(&self, now: Mono, job: JobId) -> Option<Load> {
        let (at, load) = self.heads.get(&job)?.words.back()?;
        (now.since_ms(*at) < FRESH_MS).then_some(*load)
    }

    /// Answers of the last seconds, by their time to the first token.
    pub fn recent(&self, now: Mono, job: JobId) -> FirstTokens {
        match (self.of(now, job), self.first(job)) {
            (Some(load), Some((_, first))) => load.first_tokens.since(&first.first_tokens),
            (Some(_) | None, _) => FirstTokens::default(),
        }
    }

    /// The oldest word that rates count from.
    fn first(&self, job: JobId) -> Option<(Mono, Load)> {
        self.heads.get(&job)?.words.front().copied()
    }

    pub fn view(&self, now: Mono, job: JobId) -> Option<LoadView> {
        let (load, (since, first)) = (self.of(now, job)?, self.first(job)?);
        let (at, _) = self.heads.get(&job)?.words.back()?;
        let seconds = at.since_ms(since) as f32 / 1_000.0;
        let recent = self.recent(now, job);
        let tokens = load.tokens.saturating_sub(first.tokens) as f32;
        Some(LoadView {
            running: load.running,
            waiting: load.waiting,
            answers: load.answers,
            tokens: load.tokens,
            tokens_per_second: if seconds > 0.0 { tokens / seconds } else { 0.0 },
            first_token_p50_ms: recent.quantile_ms(0.5),
            first_token_p99_ms: recent.quantile_ms(0.99),
        })
    }

    /// Questions for a model that no head has: those that wait at gateways, and those that were just refused.
    pub fn unplaced(&self, now: Mono, model: &str) -> (u32, u32) {
        let fresh = self.gateways.values().filter(|(at, _)| now.since_ms(*at) < FRESH_MS);
        let its = fresh.flat_map(|(_, demands)| demands).filter(|demand| demand.model == model);
        its.fold((0, 0), |(held, refused), demand| {
            (demand.held.saturating_add(held), demand.refused.saturating_add(refused))
        })
    }

    pub fn total(&self, model: &str) -> Total {
        self.totals.get(model).copied().unwrap_or_default()
    }

    /// Forgets what is over.
    pub fn retain(&mut self, runs: impl Fn(JobId) -> bool, is_served: impl Fn(&str) -> bool) {
        self.heads.retain(|job, _| runs(*job));
        self.totals.retain(|model, _| is_served(model));
    }
}

impl Control {
    /// Of the rank that its job has for its head, from the node that it is on.
    pub(super) fn take_load(&mut self, step: &mut Step, session: SessionId, (id, load): (RankId, Load)) {
        self.replan |= self.liveness.heard(self.now.mono, session, None);
        let Some((node, _)) = self.liveness.node(session) else { return };
        let Some(job) = self.cluster.jobs().get(id.job).filter(|job| job.is_on(id, node) && job.expects(id)) else {
            return;
        };
        let Some(serves) = job.serving().filter(|_| id.rank.0 == 0) else { return };
        self.loads.hear(self.now.mono, id, &serves.model, load);
        step.effects.push(Effect::Changed { job: id.job });
    }

    pub(super) fn take_demand(&mut self, session: SessionId, demands: Vec<Demand>) {
        self.replan |= self.liveness.heard(self.now.mono, session, None);
        let Some((node, _)) = self.liveness.node(session) else { return };
        let cluster = &self.cluster;
        self.loads.demand(self.now.mono, node, demands, |model| cluster.serving(model).next().is_some());
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::{Generation, Rank};

    use super::*;

    const JOB: JobId = JobId(1);

    fn id(generation: u64) -> RankId {
        RankId { job: JOB, generation: Generation(generation), rank: Rank(0) }
    }

    /// A head that has given so many answers of 3 tokens, each after 150 ms.
    fn load(answers: u64) -> Load {
        let mut first_tokens = FirstTokens::default();
        (0..answers).for_each(|_| first_tokens.add(150));
        Load { running: 2, waiting: 1, answers, tokens: 3 * answers, first_tokens }
    }

    #[test]
    fn rates_are_of_the_last_ten_seconds_and_silence_counts_for_nothing() {
        let mut loads = Loads::default();
        for second in 0..=20 {
            // Two answers a second, then four.
            let answers = if second <= 10 { 2 * second } else { 20 + 4 * (second - 10) };
            loads.hear(Mono(1_000 * second), id(1), "m", load(answers));
        }
        let view = loads.view(Mono(20_000), JOB).unwrap();
        assert_eq!((view.running, view.waiting, view.answers, view.tokens), (2, 1, 60, 180));
        assert_eq!((view.tokens_per_second, view.first_token_p99_ms), (12.0, Some(199)));
        assert!(loads.of(Mono(24_900), JOB).is_some() && loads.of(Mono(25_000), JOB).is_none(), "W1");
        assert_eq!((loads.view(Mono(25_000), JOB), loads.recent(Mono(25_000), JOB).count()), (None, 0));
    }

    #[test]
    fn sums_of_a_model_do_not_fall_when_a_head_is_replaced() {
        let mut loads = Loads::default();
        loads.hear(Mono(0), id(1), "m", load(50));
        loads.hear(Mono(1_000), id(2), "m", load(0));
        loads.hear(Mono(2_000), id(2), "m", load(7));
        let total = loads.total("m");
        assert_eq!((total.answers, total.tokens, total.first_tokens.count()), (57, 171, 57), "W2");
        assert_eq!(loads.view(Mono(2_000), JOB).unwrap().tokens_per_second, 21.0);
        loads.retain(|_| false, |_| false);
        assert_eq!((loads.total("m"), loads.of(Mono(2_000), JOB)), (Total::default(), None));
    }

    #[test]
    fn questions_without_a_head_are_those_of_all_gateways_that_are_heard() {
        let mut loads = Loads::default();
        let demand = |held, refused| vec![Demand { model: "m".into(), held, refused }];
        loads.demand(Mono(0), NodeId(1), demand(2, 1), |_| true);
        loads.demand(Mono(1_000), NodeId(2), demand(3, 0), |_| true);
        loads.demand(Mono(1_000), NodeId(3), demand(9, 9), |model| model != "m");
        assert_eq!(loads.unplaced(Mono(4_900), "m"), (5, 1));
        assert_eq!(loads.unplaced(Mono(5_000), "m"), (3, 0));
        loads.demand(Mono(5_000), NodeId(2), Vec::new(), |_| true);
        assert_eq!((loads.unplaced(Mono(5_000), "m"), loads.total("m").refused), ((0, 0), 1));
    }
}
