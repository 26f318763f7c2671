//! Which heads answer for a model, and which of them is asked next. Pure: owns the newest routes and what this gateway has in flight at each
//! head; knows no connection and no clock.
//!
//! G1: of the heads that answer for a model, the one with the fewest questions of this gateway is asked, then the one that was asked least;
//! one that has said that it is busy, or was lost a moment ago, only when there is no other.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use stoke_protocol::ids::JobId;
use stoke_protocol::message::rank::RankId;
use stoke_protocol::message::serve::{Head, Route, Routes};
use stoke_protocol::spec::Task;

/// A head that was lost is not asked for so long: the coordinator needs a moment to name its successor.
const LOST_REST: Duration = Duration::from_millis(200);

/// The routes, and how much is under way.
#[derive(Default)]
pub(super) struct Table {
    /// None: no routes have come yet.
    routes: Option<Routes>,
    loads: BTreeMap<RankId, Load>,
}

#[derive(Clone, Copy, Default, Debug)]
struct Load {
    running: u32,
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
    },
    /// Every head of the model is busy or was lost; the first of them may be asked again after this time.
    Later {
        after: Duration,
        busy: bool,
    },
    /// The model is known, but its ranks are coming up or being replaced.
    NoHead,
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
        self.loads.retain(|id, load| load.running > 0 || heads.contains(id));
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
        for route in self.list() {
            let first = models.entry(&route.model).or_insert(route);
            if route.created_ms < first.created_ms {
                *first = route;
            }
        }
        models.into_values().cloned().collect()
    }

    /// The head to ask for `model` (G1).
    pub(super) fn pick(&self, model: &str, tasks: &[Task], now: Instant) -> Pick {
        let named = || self.list().iter().filter(|route| route.model == model);
        let Some(any) = named().next() else {
            return Pick::Unknown { known: self.models().into_iter().map(|route| route.model).collect() };
        };
        let mut heads = named().filter(|route| tasks.contains(&route.task)).peekable();
        if heads.peek().is_none() {
            return Pick::OtherTask(any.task);
        }
        let heads: Vec<(JobId, Head)> = heads.filter_map(|route| Some((route.job, route.head?))).collect();
        let load = |head: &Head| self.loads.get(&head.id).copied().unwrap_or_default();
        let ready = heads.iter().filter(|(_, head)| load(head).rest(now).is_none());
        let best = ready.min_by_key(|(job, head)| (load(head).running, load(head).asked, *job));
        if let Some((job, head)) = best {
            return Pick::Ask { job: *job, head: *head };
        }
        let rests = heads.iter().filter_map(|(_, head)| Some((load(head).rest(now)?, load(head).is_busy(now))));
        let Some((after, _)) = rests.clone().min() else { return Pick::NoHead };
        // Where one was only lost, its successor is about to come: that is no reason to send a client away.
        Pick::Later { after, busy: rests.clone().all(|(_, busy)| busy) }
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
    use stoke_protocol::ids::{Generation, LogIndex, Rank};

    use super::*;

    fn head(job: u64, generation: u64) -> Head {
        let id = RankId { job: JobId(job), generation: Generation(generation), rank: Rank(0) };
        Head { id, address: ([127, 0, 0, 1], 4000).into(), generation: Generation(generation) }
    }

    fn route(model: &str, job: u64, head: Option<Head>) -> Route {
        Route { model: model.to_owned(), job: JobId(job), task: Task::Generate, created_ms: job, head }
    }

    fn table(index: u64, routes: Vec<Route>) -> Table {
        let mut table = Table::default();
        assert!(table.renew(Routes { index: LogIndex(index), routes: routes.into() }));
        table
    }

    fn picked(table: &Table, now: Instant) -> u64 {
        match table.pick("m", &[Task::Generate], now) {
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
        assert_eq!(table.pick("m", &[Task::Generate], Instant::now()), Pick::Unknown { known: Vec::new() });
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
        assert_eq!(table.pick("m", &[Task::Generate], now), later);
        assert_eq!(picked(&table, now + Duration::from_secs(1)), 2);
        table.lost(head(2, 1).id, now + Duration::from_secs(1));
        let later = Pick::Later { after: LOST_REST, busy: false };
        assert_eq!(table.pick("m", &[Task::Generate], now + Duration::from_secs(1)), later);
    }

    #[test]
    fn a_model_without_a_head_is_not_an_unknown_one() {
        let now = Instant::now();
        let table = table(1, vec![route("m", 1, None), route("z", 2, None), route("m", 3, None)]);
        assert_eq!(table.pick("m", &[Task::Generate], now), Pick::NoHead);
        assert_eq!(table.pick("m", &[Task::Embed], now), Pick::OtherTask(Task::Generate));
        let known = vec!["m".to_owned(), "z".to_owned()];
        assert_eq!(table.pick("x", &[Task::Generate], now), Pick::Unknown { known });
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
}
