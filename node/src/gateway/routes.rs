//! Which heads answer for a model, and which of them is asked next. Pure: owns the newest routes and what this gateway has in flight at each
//! head; knows no connection and no clock.
//!
//! G1: of the heads that answer for a model, the one with the fewest questions of this gateway is asked, then the one that was asked least;
//! one that has said that it is busy, or was lost a moment ago, only when there is no other.
//! G7: a job with a share gets that part of a model's new questions: of the first n, its share of n within 5 (`draw`). Where those that a question
//! has fallen to cannot take it, others that get new questions do. A shadow gets none, a job that leaves none that has not begun at its revision.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use stoke_protocol::ids::{JobId, LogIndex};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::message::serve::{Head, Route, Routes, Traffic};
use stoke_protocol::spec::Task;

/// A head that was lost is not asked for so long: the coordinator needs a moment to name its successor.
const LOST_REST: Duration = Duration::from_millis(200);

/// Copies of questions at a shadow at a time: beyond that it is not as fast as those it is compared with, and would only fall behind.
const COPIES_MAX: u32 = 32;
/// The golden ratio's fraction of 2^64: its multiples fall evenly into every interval, and into every second, third, ... of them as well, so that a
/// client that asks two kinds of questions in turn sends the same part of both.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The routes, and how much is under way.
#[derive(Default)]
pub(super) struct Table {
    /// None: no routes have come yet.
    routes: Option<Routes>,
    loads: BTreeMap<RankId, Load>,
    /// The last draw of each model.
    draws: BTreeMap<String, u64>,
}

/// Which of a model's jobs a question is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Aim {
    /// Those that get new questions, by a draw of all 64 bits (G7).
    Drawn(u64),
    /// Those of a revision: an answer that has begun there goes on.
    Revision(u64),
    /// One, whatever it gets otherwise.
    Job(JobId),
}

#[derive(Clone, Copy, Default, Debug)]
struct Load {
    running: u32,
    /// Copies of questions, whose answers nobody gets.
    copies: u32,
    asked: u64,
    /// It takes nothing more before then.
    busy_until: Option<Instant>,
    lost_until: Option<Instant>,
}

/// Where a question goes.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Pick {
    Ask {
        job: JobId,
        head: Head,
        revision: u64,
    },
    /// Every head of the model is busy or was lost; the first of them may be asked again after this time.
    Later {
        after: Duration,
        busy: bool,
    },
    /// The model is known, but its ranks are coming up or being replaced.
    NoHead,
    /// The model is served, but not in the revision that began the answer.
    NoRevision,
    /// Models of this name do something else.
    OtherTask(Task),
    /// Nobody serves it; those that are served.
    Unknown {
        known: Vec<String>,
    },
}

/// Whether a head is still where a question that was sent to it is answered best.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Standing {
    /// It is the head of its job, or the job has none now: what it says counts.
    Current,
    /// Another rank is the head of its job.
    Replaced,
}

impl Table {
    /// Takes newer routes. False for ones that are not newer, which change nothing.
    pub(super) fn renew(&mut self, routes: Routes) -> bool {
        if self.routes.as_ref().is_some_and(|known| known.index >= routes.index) {
            return false;
        }
        let heads: Vec<RankId> = routes.routes.iter().filter_map(|route| Some(route.head?.id)).collect();
        self.loads.retain(|id, load| load.running > 0 || load.copies > 0 || heads.contains(id));
        self.draws.retain(|model, _| routes.routes.iter().any(|route| route.model == *model));
        self.routes = Some(routes);
        true
    }

    /// Whether routes have come at all.
    pub(super) fn is_known(&self) -> bool {
        self.routes.is_some()
    }

    fn list(&self) -> &[Route] {
        self.routes.as_ref().map_or(&[], |routes| &routes.routes)
    }

    /// Every head there is.
    pub(super) fn heads(&self) -> impl Iterator<Item = Head> + '_ {
        self.list().iter().filter_map(|route| route.head)
    }

    /// Each model once, by name: the oldest job of its replicas tells when it was created.
    pub(super) fn models(&self) -> Vec<Route> {
        let mut models = BTreeMap::<&str, &Route>::new();
        for route in self.list().iter().filter(|route| route.traffic != Traffic::Shadow) {
            let first = models.entry(&route.model).or_insert(route);
            if route.created_ms < first.created_ms {
                *first = route;
            }
        }
        models.into_values().cloned().collect()
    }

    /// A place for a new question among all of its model (G7). None: nobody serves it.
    pub(super) fn draw(&mut self, model: &str) -> Option<u64> {
        self.serves(model).then_some(())?;
        let draw = self.draws.entry(model.to_owned()).or_default();
        *draw = draw.wrapping_add(GOLDEN);
        Some(*draw)
    }

    /// The head to ask for `model` (G1, G7).
    pub(super) fn pick(&self, model: &str, tasks: &[Task], aim: Aim, now: Instant) -> Pick {
        let named = || self.list().iter().filter(|route| route.model == model);
        let aimed = |route: &&Route| match aim {
            Aim::Drawn(_) => !matches!(route.traffic, Traffic::Shadow | Traffic::Leaving),
            Aim::Revision(revision) => route.revision == revision && route.traffic != Traffic::Shadow,
            Aim::Job(job) => route.job == job,
        };
        let is_served = |route: &&Route| route.traffic != Traffic::Shadow || aimed(route);
        let Some(any) = named().find(is_served) else {
            return Pick::Unknown { known: self.models().into_iter().map(|route| route.model).collect() };
        };
        let mut routes = named().filter(|route| tasks.contains(&route.task)).filter(is_served).peekable();
        if routes.peek().is_none() {
            return Pick::OtherTask(any.task);
        }
        let mut routes = routes.filter(aimed).peekable();
        if routes.peek().is_none() && matches!(aim, Aim::Revision(_)) {
            return Pick::NoRevision;
        }
        let heads: Vec<(&Route, Head)> = routes.filter_map(|route| Some((route, route.head?))).collect();
        let load = |head: &Head| self.loads.get(&head.id).copied().unwrap_or_default();
        let ready = heads.iter().filter(|(_, head)| load(head).rest(now).is_none());
        let drawn = if let Aim::Drawn(draw) = aim { self.share_of(model, draw) } else { None };
        let is_second = |route: &Route| match (aim, route.traffic) {
            (Aim::Drawn(_), Traffic::Share { .. }) => drawn != Some(route.job),
            (Aim::Drawn(_), _) => drawn.is_some(),
            (Aim::Revision(_), traffic) => traffic == Traffic::Leaving,
            (Aim::Job(_), _) => false,
        };
        let order = |(route, head): &&(&Route, Head)| {
            let load = load(head);
            (is_second(route), load.running, load.asked, route.job)
        };
        if let Some((route, head)) = ready.min_by_key(order) {
            return Pick::Ask { job: route.job, head: *head, revision: route.revision };
        }
        let rests = heads.iter().filter_map(|(_, head)| Some((load(head).rest(now)?, load(head).is_busy(now))));
        let Some((after, _)) = rests.clone().min() else { return Pick::NoHead };
        // Where one was only lost, its successor is about to come: that is no reason to send a client away.
        Pick::Later { after, busy: rests.clone().all(|(_, busy)| busy) }
    }

    /// The job into whose share a draw falls. None: into none.
    fn share_of(&self, model: &str, draw: u64) -> Option<JobId> {
        let place = ((u128::from(draw) * 1_000_000) >> 64) as u32;
        let mut end = 0u32;
        self.list().iter().filter(|route| route.model == model).find_map(|route| {
            let Traffic::Share { millionths } = route.traffic else { return None };
            end = end.saturating_add(millionths);
            (place < end).then_some(route.job)
        })
    }

    /// Shadows that have room for a copy of a question, which is counted there from now on.
    pub(super) fn begin_copies(&mut self, model: &str, tasks: &[Task], now: Instant) -> Vec<Head> {
        let shadow =
            |route: &&Route| route.traffic == Traffic::Shadow && route.model == model && tasks.contains(&route.task);
        let heads: Vec<Head> = self.list().iter().filter(shadow).filter_map(|route| route.head).collect();
        let mut begun = Vec::new();
        for head in heads {
            let load = self.loads.entry(head.id).or_default();
            if load.rest(now).is_none() && load.copies < COPIES_MAX {
                load.copies += 1;
                begun.push(head);
            }
        }
        begun
    }

    pub(super) fn end_copy(&mut self, id: RankId) {
        if let Some(load) = self.loads.get_mut(&id) {
            load.copies = load.copies.saturating_sub(1);
        }
    }

    /// The newest routes, and how many questions are at jobs that leave by them.
    pub(super) fn leaving(&self) -> (LogIndex, u32) {
        let index = self.routes.as_ref().map_or(LogIndex(0), |routes| routes.index);
        let leaves =
            |id: &RankId| self.list().iter().any(|route| route.job == id.job && route.traffic == Traffic::Leaving);
        (index, self.loads.iter().filter(|(id, _)| leaves(id)).map(|(_, load)| load.running).sum())
    }

    /// Whether any job serves it.
    pub(super) fn serves(&self, model: &str) -> bool {
        self.list().iter().any(|route| route.model == model)
    }

    /// Whether a job serves this model, as a shadow too.
    pub(super) fn has(&self, model: &str, job: JobId) -> bool {
        self.list().iter().any(|route| route.model == model && route.job == job)
    }

    /// What has become of a head that was asked.
    pub(super) fn standing(&self, job: JobId, id: RankId) -> Standing {
        match self.list().iter().find(|route| route.job == job).map(|route| route.head) {
            Some(Some(head)) if head.id != id => Standing::Replaced,
            Some(Some(_) | None) => Standing::Current,
            // The job is on its way out.
            None => Standing::Replaced,
        }
    }

    /// A question goes to a head.
    pub(super) fn begin(&mut self, id: RankId) {
        let load = self.loads.entry(id).or_default();
        load.running += 1;
        load.asked += 1;
    }

    /// A question is over there, in whatever way.
    pub(super) fn end(&mut self, id: RankId) {
        if let Some(load) = self.loads.get_mut(&id) {
            load.running = load.running.saturating_sub(1);
        }
    }

    /// A head takes nothing more for a while.
    pub(super) fn busy(&mut self, id: RankId, until: Instant) {
        self.loads.entry(id).or_default().busy_until = Some(until);
    }

    /// A head was not reached, went away in the middle, or is in another generation than the routes say.
    pub(super) fn lost(&mut self, id: RankId, now: Instant) {
        self.loads.entry(id).or_default().lost_until = Some(now + LOST_REST);
    }

    /// Questions that are under way.
    pub(super) fn running(&self) -> u64 {
        self.loads.values().map(|load| u64::from(load.running)).sum()
    }
}

impl Load {
    /// How long it is to be left alone.
    fn rest(&self, now: Instant) -> Option<Duration> {
        let left = |until: Option<Instant>| until?.checked_duration_since(now).filter(|left| !left.is_zero());
        left(self.busy_until).max(left(self.lost_until))
    }

    fn is_busy(&self, now: Instant) -> bool {
        self.busy_until.is_some_and(|until| until > now)
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::{Generation, Rank};

    use super::*;

    fn head(job: u64, generation: u64) -> Head {
        let id = RankId { job: JobId(job), generation: Generation(generation), rank: Rank(0) };
        Head { id, address: ([127, 0, 0, 1], 4000).into(), generation: Generation(generation) }
    }

    fn route(model: &str, job: u64, head: Option<Head>) -> Route {
        let (model, task, traffic) = (model.to_owned(), Task::Generate, Traffic::Rest);
        Route { model, job: JobId(job), task, created_ms: job, head, revision: 1, traffic }
    }

    const ANY: Aim = Aim::Drawn(u64::MAX);

    /// A job of revision 2 with a share.
    fn canary(job: u64, millionths: u32) -> Route {
        let traffic = Traffic::Share { millionths };
        Route { revision: 2, traffic, ..route("m", job, Some(head(job, 1))) }
    }

    fn table(index: u64, routes: Vec<Route>) -> Table {
        let mut table = Table::default();
        assert!(table.renew(Routes { index: LogIndex(index), routes: routes.into() }));
        table
    }

    fn picked(table: &Table, now: Instant) -> u64 {
        aimed(table, ANY, now)
    }

    fn aimed(table: &Table, aim: Aim, now: Instant) -> u64 {
        match table.pick("m", &[Task::Generate], aim, now) {
            Pick::Ask { job, .. } => job.0,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn older_routes_change_nothing() {
        let mut table = table(7, vec![route("m", 1, Some(head(1, 1)))]);
        assert!(!table.renew(Routes { index: LogIndex(7), routes: Vec::new().into() }));
        assert!(!table.renew(Routes { index: LogIndex(6), routes: Vec::new().into() }));
        assert_eq!(picked(&table, Instant::now()), 1);
        assert!(table.renew(Routes { index: LogIndex(8), routes: Vec::new().into() }));
        assert_eq!(table.pick("m", &[Task::Generate], ANY, Instant::now()), Pick::Unknown { known: Vec::new() });
    }

    #[test]
    fn the_head_with_the_fewest_questions_is_asked() {
        let now = Instant::now();
        let mut table = table(1, vec![route("m", 1, Some(head(1, 1))), route("m", 2, Some(head(2, 1)))]);
        table.begin(head(1, 1).id);
        assert_eq!(picked(&table, now), 2);
        table.begin(head(2, 1).id);
        table.begin(head(2, 1).id);
        assert_eq!(picked(&table, now), 1);
        // With equally many, the one that was asked least: idle heads take turns.
        table.end(head(1, 1).id);
        table.end(head(2, 1).id);
        table.end(head(2, 1).id);
        assert_eq!(picked(&table, now), 1);
        assert_eq!(table.running(), 0);
    }

    #[test]
    fn busy_and_lost_heads_are_left_alone_for_a_while() {
        let now = Instant::now();
        let mut table = table(1, vec![route("m", 1, Some(head(1, 1))), route("m", 2, Some(head(2, 1)))]);
        table.busy(head(1, 1).id, now + Duration::from_secs(2));
        assert_eq!(picked(&table, now), 2);
        table.busy(head(2, 1).id, now + Duration::from_secs(1));
        let later = Pick::Later { after: Duration::from_secs(1), busy: true };
        assert_eq!(table.pick("m", &[Task::Generate], ANY, now), later);
        assert_eq!(picked(&table, now + Duration::from_secs(1)), 2);
        table.lost(head(2, 1).id, now + Duration::from_secs(1));
        let later = Pick::Later { after: LOST_REST, busy: false };
        assert_eq!(table.pick("m", &[Task::Generate], ANY, now + Duration::from_secs(1)), later);
    }

    #[test]
    fn a_model_without_a_head_is_not_an_unknown_one() {
        let now = Instant::now();
        let table = table(1, vec![route("m", 1, None), route("z", 2, None), route("m", 3, None)]);
        assert_eq!(table.pick("m", &[Task::Generate], ANY, now), Pick::NoHead);
        assert_eq!(table.pick("m", &[Task::Embed], ANY, now), Pick::OtherTask(Task::Generate));
        let known = vec!["m".to_owned(), "z".to_owned()];
        assert_eq!(table.pick("x", &[Task::Generate], ANY, now), Pick::Unknown { known });
        assert_eq!(table.models().len(), 2);
    }

    #[test]
    fn a_head_is_replaced_only_by_another_rank() {
        let mut table = table(1, vec![route("m", 1, Some(head(1, 1)))]);
        assert_eq!(table.standing(JobId(1), head(1, 1).id), Standing::Current);
        // The same process in a newer generation.
        let newer = Head { generation: Generation(2), ..head(1, 1) };
        table.renew(Routes { index: LogIndex(2), routes: vec![route("m", 1, Some(newer))].into() });
        assert_eq!(table.standing(JobId(1), head(1, 1).id), Standing::Current);
        table.renew(Routes { index: LogIndex(3), routes: vec![route("m", 1, None)].into() });
        assert_eq!(table.standing(JobId(1), head(1, 1).id), Standing::Current);
        table.renew(Routes { index: LogIndex(4), routes: vec![route("m", 1, Some(head(1, 3)))].into() });
        assert_eq!(table.standing(JobId(1), head(1, 1).id), Standing::Replaced);
    }

    /// G7: also of every second question, and at any moment.
    #[test]
    fn a_share_is_that_part_of_the_questions() {
        let now = Instant::now();
        for millionths in [1_000, 10_000, 100_000, 250_000, 333_333, 500_000, 618_034, 750_000, 999_000, 1_000_000] {
            let mut table = table(1, vec![route("m", 1, Some(head(1, 1))), canary(2, millionths), canary(3, 0)]);
            let (mut all, mut second) = (0.0f64, 0.0f64);
            for asked in 1..=1_000 {
                let draw = table.draw("m").unwrap();
                let got = f64::from(u8::from(aimed(&table, Aim::Drawn(draw), now) == 2));
                all += got;
                second += if asked % 2 == 0 { got } else { 0.0 };
                let part = f64::from(millionths) / 1e6;
                assert!((all - part * f64::from(asked)).abs() <= 5.0, "{all} of {asked} for {part}");
                assert!((second - part * f64::from(asked / 2)).abs() <= 5.0, "{second} of {} for {part}", asked / 2);
            }
        }
        assert_eq!(table(1, Vec::new()).draw("m"), None);
    }

    #[test]
    fn several_shares_leave_the_rest_to_the_others() {
        let now = Instant::now();
        let regular = [1, 4].map(|job| route("m", job, Some(head(job, 1))));
        let mut table = table(1, [&regular[..], &[canary(2, 200_000), canary(3, 300_000)]].concat());
        let mut got = BTreeMap::<u64, i32>::new();
        for _ in 0..1_000 {
            let draw = table.draw("m").unwrap();
            let Pick::Ask { job, head, .. } = table.pick("m", &[Task::Generate], Aim::Drawn(draw), now) else {
                panic!("no head")
            };
            table.begin(head.id);
            table.end(head.id);
            *got.entry(job.0).or_default() += 1;
        }
        for (job, due) in [(1, 250), (2, 200), (3, 300), (4, 250)] {
            assert!((got[&job] - due).abs() <= 5, "{got:?}");
        }
    }

    #[test]
    fn whoever_cannot_take_its_part_leaves_it_to_the_others() {
        let now = Instant::now();
        let mut table = table(1, vec![route("m", 1, Some(head(1, 1))), canary(2, 500_000)]);
        assert_eq!((aimed(&table, Aim::Drawn(0), now), aimed(&table, Aim::Drawn(u64::MAX), now)), (2, 1));
        table.lost(head(2, 1).id, now);
        assert_eq!(aimed(&table, Aim::Drawn(0), now), 1);
        table.busy(head(1, 1).id, now + Duration::from_secs(1));
        table.renew(Routes { index: LogIndex(2), routes: vec![route("m", 1, None), canary(2, 500_000)].into() });
        assert_eq!(aimed(&table, Aim::Drawn(u64::MAX), now + LOST_REST), 2);
    }

    #[test]
    fn an_answer_goes_on_at_its_revision_and_at_one_that_leaves_only_then() {
        let now = Instant::now();
        let leaving = |job| Route { traffic: Traffic::Leaving, ..route("m", job, Some(head(job, 1))) };
        let mut table = table(5, vec![leaving(1), canary(2, 1)]);
        assert_eq!(aimed(&table, ANY, now), 2, "new ones do not go to a job that leaves");
        assert_eq!(aimed(&table, Aim::Revision(1), now), 1);
        assert_eq!(aimed(&table, Aim::Revision(2), now), 2);
        assert_eq!(table.pick("m", &[Task::Generate], Aim::Revision(3), now), Pick::NoRevision);
        assert_eq!(table.leaving(), (LogIndex(5), 0));
        table.begin(head(1, 1).id);
        table.begin(head(2, 1).id);
        assert_eq!(table.leaving(), (LogIndex(5), 1));
        // One that stays goes first.
        table.renew(Routes { index: LogIndex(6), routes: vec![leaving(1), route("m", 3, Some(head(3, 1)))].into() });
        assert_eq!(aimed(&table, Aim::Revision(1), now), 3);
    }

    #[test]
    fn a_shadow_gets_copies_only_and_so_many_at_a_time() {
        let now = Instant::now();
        let shadow = Route { traffic: Traffic::Shadow, ..canary(2, 0) };
        let mut table = table(1, vec![shadow.clone(), route("m", 1, Some(head(1, 1)))]);
        assert_eq!([Aim::Drawn(0), ANY].map(|aim| aimed(&table, aim, now)), [1, 1]);
        assert_eq!(aimed(&table, Aim::Job(JobId(2)), now), 2);
        for _ in 0..COPIES_MAX {
            assert_eq!(table.begin_copies("m", &[Task::Generate], now), [head(2, 1)]);
        }
        assert_eq!(table.begin_copies("m", &[Task::Generate], now), []);
        table.end_copy(head(2, 1).id);
        table.busy(head(2, 1).id, now + Duration::from_secs(1));
        assert_eq!(table.begin_copies("m", &[Task::Generate], now), [], "it is busy");
        assert_eq!(table.begin_copies("m", &[Task::Generate], now + Duration::from_secs(2)), [head(2, 1)]);
        assert_eq!(table.running(), 0);
        // Nobody is served by a shadow alone.
        table.renew(Routes { index: LogIndex(2), routes: vec![shadow].into() });
        assert!(matches!(table.pick("m", &[Task::Generate], ANY, now), Pick::Unknown { .. }));
        assert!(table.models().is_empty() && table.has("m", JobId(2)));
    }
}
