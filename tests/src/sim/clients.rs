//! People and programs that ask: they join machines, submit, cancel and look. A client whose answer does not come does not know what became of
//! its question (I9), and asks again with the same key. Owns the questions; what they were told is remembered by the oracle.

use std::collections::BTreeMap;

use stoke_coordinator::state::Input;
use stoke_coordinator::state::effect::Member;
use stoke_protocol::identity::{Subject, UserRole};
use stoke_protocol::ids::{Digest, JobId, NodeId, Step, TokenId};
use stoke_protocol::message::client::{Refusal, RefusalCode, Reply, Request, TokenScope};
use stoke_protocol::message::join::Wants;

use super::oracle::Submission;
use super::plan::{Ask, ROOT, TimedAsk};
use super::store::digest;
use super::world::{Happening, Ms, World};

const PATIENCE_MS: Ms = 4_000;
const AGAIN_MS: (Ms, Ms) = (200, 2_000);

pub struct Clients {
    subjects: Vec<Subject>,
    asks: BTreeMap<u64, Asked>,
    made: u64,
    secrets: Vec<(TokenId, Digest)>,
    /// Tokens that have let somebody in, or are revoked, or whose secret nobody knows: none may let in.
    used: Vec<TokenId>,
    /// Tokens that may be revoked.
    spare: Vec<TokenId>,
}

struct Asked {
    client: usize,
    question: Question,
    attempt: u32,
    done: bool,
    secret: Digest,
}

#[derive(Clone, Debug)]
enum Question {
    /// A token for a machine.
    Token {
        machine: usize,
    },
    Join {
        machine: usize,
        token: TokenId,
    },
    /// A token that nobody joins with.
    Spare,
    Revoke {
        token: TokenId,
    },
    /// With a token that has been used or revoked, or a wrong secret.
    Replay {
        token: TokenId,
    },
    Submit {
        key: String,
        spec: String,
    },
    /// Under a key that has another job.
    SubmitOther {
        key: String,
        spec: String,
    },
    /// By somebody who may not.
    SubmitForbidden {
        key: String,
        spec: String,
    },
    Cancel {
        job: JobId,
    },
    Scale {
        job: JobId,
        ranks: u32,
    },
    Drain {
        node: NodeId,
        deadline_ms: Option<u64>,
    },
    Undrain {
        node: NodeId,
    },
    Remove {
        node: NodeId,
    },
    /// Pins one that the client may know of, takes a pin back, or prunes.
    Shelf(Request),
    Look(Request),
}

/// What comes back, as the client sees it.
#[derive(Clone, Debug)]
pub enum Answer {
    Reply(Box<Reply>),
    Token(TokenId),
    Admitted(Member),
    Denied(String),
    Granted,
}

impl Clients {
    pub fn new() -> Self {
        let user = |role, name: &str| Subject::user(role, name).expect("a good name");
        let subjects = vec![
            user(UserRole::Admin, "root"),
            user(UserRole::Viewer, "vera"),
            user(UserRole::Submitter, "ada"),
            user(UserRole::Submitter, "bob"),
            user(UserRole::Operator, "olga"),
        ];
        Self { subjects, asks: BTreeMap::new(), made: 0, secrets: Vec::new(), used: Vec::new(), spare: Vec::new() }
    }

    pub fn owner(&self, client: usize) -> String {
        match &self.subjects[client] {
            Subject::User { name, .. } => name.clone(),
            other => other.to_string(),
        }
    }

    /// Questions without an answer.
    pub fn waiting(&self) -> Vec<String> {
        self.asks.values().filter(|ask| !ask.done).map(|ask| format!("{:?}", ask.question)).collect()
    }
}

impl World {
    /// Machines come one after the other, each with a token of its own.
    pub fn machine_comes(&mut self, machine: usize) {
        self.ask(ROOT, Question::Token { machine });
    }

    /// What is planned is asked, if there is what it is about.
    pub fn asks(&mut self, at: usize) {
        let TimedAsk { client, ask, .. } = self.plan.asks[at].clone();
        let noted = ask.clone();
        if let Some(question) = self.question(client, ask).filter(|_| !self.calm) {
            self.coverage.note("ask", &noted);
            self.ask(client, question);
        }
    }

    fn question(&mut self, client: usize, ask: Ask) -> Option<Question> {
        let owner = self.clients.owner(client);
        let known = |world: &Self, of: usize, key: u64| {
            world.oracle.submissions.get(&(world.clients.owner(of), key_text(key))).cloned()
        };
        let acked = |world: &Self, of: usize, key: u64| known(world, of, key)?.acked;
        Some(match ask {
            Ask::Submit { key, job } => {
                let (key, spec) = (key_text(key), job.text());
                let submission = Submission { spec: spec.clone(), acked: None };
                self.oracle.submissions.entry((owner, key.clone())).or_insert(submission);
                Question::Submit { key, spec }
            }
            Ask::Again { key } => Question::Submit { spec: known(self, client, key)?.spec, key: key_text(key) },
            Ask::SubmitOther { key, job } => {
                let (known, spec) = (known(self, client, key)?, job.text());
                (known.spec != spec).then(|| Question::SubmitOther { key: key_text(key), spec })?
            }
            Ask::SubmitForbidden { key, job } => {
                let key = format!("forbidden-{key}");
                self.oracle.forbidden.insert(key.clone());
                Question::SubmitForbidden { key, spec: job.text() }
            }
            Ask::Cancel { of, key } => Question::Cancel { job: acked(self, of, key)? },
            Ask::Scale { of, key, ranks } => Question::Scale { job: acked(self, of, key)?, ranks },
            Ask::Shelf { of, key, pick } => Question::Shelf(self.shelf_request(acked(self, of, key)?, pick)),
            Ask::Drain { machine, deadline_ms } => {
                Question::Drain { node: self.machines.get(machine)?.node?, deadline_ms }
            }
            Ask::Remove { machine } => Question::Remove { node: self.machines.get(machine)?.node? },
            Ask::Undrain { machine } => Question::Undrain { node: self.machines.get(machine)?.node? },
            Ask::Replay { pick } => {
                let used = &self.clients.used;
                Question::Replay { token: *used.get(pick as usize % used.len().max(1))? }
            }
            Ask::Spare => Question::Spare,
            Ask::Revoke => Question::Revoke { token: self.clients.spare.pop()? },
            Ask::Tokens => Question::Look(Request::TokenList),
            Ask::Renew => Question::Look(Request::Renew { csr: vec![1, 2, 3].into() }),
            Ask::Checkpoints { of, key } => Question::Look(Request::Checkpoints { job: acked(self, of, key) }),
            Ask::Watch { of, key } => Question::Look(Request::Watch { job: acked(self, of, key)? }),
            Ask::Logs { of, key } => {
                let job = acked(self, of, key)?;
                Question::Look(Request::Logs { job, rank: None, tail: Some(3), follow: false })
            }
            Ask::Job { of, key } => Question::Look(Request::Job { job: acked(self, of, key)? }),
            Ask::Explain { of, key } => Question::Look(Request::Explain { job: acked(self, of, key)? }),
            Ask::Nodes => Question::Look(Request::Nodes),
            Ask::Cluster => Question::Look(Request::Cluster),
            Ask::Jobs => Question::Look(Request::Jobs),
        })
    }

    /// A machine whose node was removed becomes another one.
    pub fn rejoin(&mut self, machine: usize) {
        self.ask(0, Question::Token { machine });
    }

    /// Nodes that are still being drained when the faults stop serve again: everything is to come to an end.
    pub fn lift_drains(&mut self) {
        let members: Vec<NodeId> = self.machines.iter().filter_map(|machine| machine.node).collect();
        members.into_iter().for_each(|node| self.ask(ROOT, Question::Undrain { node }));
    }

    /// About a checkpoint of the job, where it has one.
    fn shelf_request(&self, job: JobId, pick: u64) -> Request {
        let known: Vec<Step> = self.cluster().catalogue().of(job).map(|checkpoint| checkpoint.step).collect();
        let step = known.get(pick as usize / 4 % known.len().max(1)).copied().unwrap_or(Step(1));
        match pick % 4 {
            0 | 1 => Request::Pin { job, step },
            2 => Request::Unpin { job, step },
            _ => Request::Prune { job, keep: Some(1), dry_run: false },
        }
    }

    fn ask(&mut self, client: usize, question: Question) {
        self.clients.made += 1;
        let ask = self.clients.made;
        let mut secret = digest(&format!("the secret of ask {ask}"));
        match &question {
            Question::Join { token, .. } | Question::Replay { token } => {
                secret =
                    self.clients.secrets.iter().find(|(made, _)| made == token).map_or(secret, |(_, secret)| *secret);
            }
            _ => {}
        }
        self.clients.asks.insert(ask, Asked { client, question, attempt: 0, done: false, secret });
        self.send_ask(ask);
    }

    fn send_ask(&mut self, ask: u64) {
        let Some(found) = self.clients.asks.get_mut(&ask) else { return };
        found.attempt += 1;
        let attempt = found.attempt;
        if let Some(trip) = self.client_trip() {
            self.after(trip, Happening::Asked { ask, attempt });
        }
        self.after(PATIENCE_MS, Happening::AskTimedOut { ask, attempt });
    }

    /// How long a message takes; none when it is lost.
    fn client_trip(&mut self) -> Option<Ms> {
        let rates = self.rates;
        let net = &mut self.streams.client_net;
        if net.chance("loss", rates.client_loss) {
            return None;
        }
        let tail = if net.chance("tail", rates.tail) { net.between("tail-trip", 0, rates.tail_ms) } else { 0 };
        Some(net.between("trip", 1, 30) + tail)
    }

    pub fn ask_timed_out(&mut self, ask: u64, attempt: u32) {
        if self.clients.asks.get(&ask).is_some_and(|found| !found.done && found.attempt == attempt) {
            if self.streams.clients.chance("hangs-up", 0.3) {
                self.hang_up(ask);
            }
            self.send_ask(ask);
        }
    }

    /// A question arrives at the coordinator. Clients are kept off an old copy: whoever starts one loses what it answers.
    pub fn asked(&mut self, ask: u64, attempt: u32) {
        if self.coordinator.as_ref().is_none_or(|coordinator| coordinator.copy) {
            return;
        }
        let Some(ticket) = self.client_ticket(ask) else { return };
        let found = &self.clients.asks[&ask];
        let caller = self.clients.subjects[found.client].clone();
        let secret_hash = found.secret;
        let request = match found.question.clone() {
            Question::Token { .. } | Question::Spare => {
                Request::TokenCreate { scope: TokenScope::Node, ttl_seconds: 3_600 }
            }
            Question::Join { token, machine } => {
                let wants = Wants::Node { name: format!("m{machine}") };
                return self.input(Input::Join { ticket, token, secret_hash, wants });
            }
            Question::Replay { token } => {
                let wants = Wants::Node { name: "replayed".into() };
                return self.input(Input::Join { ticket, token, secret_hash, wants });
            }
            Question::Submit { key, spec }
            | Question::SubmitOther { key, spec }
            | Question::SubmitForbidden { key, spec } => Request::Submit { key, spec },
            Question::Revoke { token } => Request::TokenRevoke { token },
            Question::Cancel { job } => Request::Cancel { job },
            Question::Scale { job, ranks } => Request::Scale { job, ranks },
            Question::Drain { node, deadline_ms } => Request::Drain { node, deadline_ms },
            Question::Undrain { node } => Request::Undrain { node },
            Question::Remove { node } => Request::RemoveNode { node },
            Question::Look(request) | Question::Shelf(request) => request,
        };
        self.coverage.note("request", &request);
        self.say(|_| format!("{caller} asks ({ask}.{attempt}): {}", short(&request)));
        self.input(Input::Request { ticket, caller, request, secret_hash });
    }

    pub fn reply(&mut self, ask: u64, reply: Reply) {
        if let Reply::Cancelled { job } = &reply {
            self.oracle.cancelled.insert(*job);
            self.changed = true;
        }
        self.answer(ask, Answer::Reply(Box::new(reply)));
    }

    pub fn token_made(&mut self, ask: u64, token: TokenId) {
        self.answer(ask, Answer::Token(token));
    }

    pub fn admitted(&mut self, ask: u64, member: Member) {
        if let Some(Question::Replay { token }) = self.clients.asks.get(&ask).map(|found| found.question.clone()) {
            self.oracle.note("I33", || format!("{token} has let in, which it must not any more"));
            self.changed = true;
        }
        self.answer(ask, Answer::Admitted(member));
    }

    pub fn granted(&mut self, ask: u64) {
        self.answer(ask, Answer::Granted);
    }

    pub fn denied(&mut self, ask: u64, reason: &str) {
        self.answer(ask, Answer::Denied(reason.to_owned()));
    }

    fn answer(&mut self, ask: u64, answer: Answer) {
        if let Some(trip) = self.client_trip() {
            self.after(trip, Happening::Answered { ask, answer });
        }
    }

    pub fn answered(&mut self, ask: u64, answer: Answer) {
        let Some(found) = self.clients.asks.get_mut(&ask) else { return };
        let (question, client, secret) = (found.question.clone(), found.client, found.secret);
        let again = match answer {
            Answer::Reply(reply) => self.told(&question, client, *reply),
            Answer::Token(token) => {
                let first = !std::mem::replace(&mut found.done, true);
                match question {
                    Question::Token { machine } if first => {
                        self.clients.secrets.push((token, secret));
                        self.ask(ROOT, Question::Join { machine, token });
                    }
                    Question::Spare if first => {
                        // Its secret is kept by nobody: a join with it is a guess.
                        self.clients.spare.push(token);
                        self.clients.used.push(token);
                    }
                    _ => {}
                }
                return;
            }
            Answer::Admitted(member) => {
                found.done = true;
                if let (Question::Join { machine, token }, Member::Node { node }) = (question, member)
                    && self.machines[machine].node.is_none()
                {
                    self.clients.used.push(token);
                    self.machines[machine].node = Some(node);
                    self.agent_boot(machine);
                }
                return;
            }
            Answer::Granted => {
                found.done = true;
                return;
            }
            Answer::Denied(reason) => {
                let first = !std::mem::replace(&mut found.done, true);
                if let (Question::Join { machine, .. }, true) = (question, first) {
                    // The answer of an earlier try was lost: that member has no machine. Another token.
                    let spent = reason.contains("used already") || reason.contains("expired");
                    assert!(spent || !reason.is_empty(), "a refusal says why");
                    if self.machines[machine].node.is_none() {
                        self.ask(ROOT, Question::Token { machine });
                    }
                }
                return;
            }
        };
        if again {
            let wait = self.streams.clients.between("again", AGAIN_MS.0, AGAIN_MS.1);
            let attempt = self.clients.asks[&ask].attempt;
            self.after(wait, Happening::AskTimedOut { ask, attempt });
        } else if let Some(found) = self.clients.asks.get_mut(&ask) {
            found.done = true;
        }
    }

    /// What a client learns; whether it has to ask again.
    fn told(&mut self, question: &Question, client: usize, reply: Reply) -> bool {
        self.changed = true;
        if let Reply::Refused(Refusal { code: RefusalCode::Unavailable, .. }) = &reply {
            return !matches!(question, Question::Look(_));
        }
        let owner = self.clients.owner(client);
        match (question, reply) {
            (Question::Submit { key, spec } | Question::SubmitOther { key, spec }, Reply::Submitted { job, .. }) => {
                let known =
                    self.oracle.submissions.get_mut(&(owner, key.clone())).expect("registered when first asked");
                match known.acked {
                    Some(before) if before != job || known.spec != *spec => {
                        self.oracle.note("I7", || format!("{key:?} was {before}, this spec or another has made {job}"));
                    }
                    // Until one spec is known to own the key, another may have come first.
                    Some(_) | None => (known.acked, known.spec) = (Some(job), spec.clone()),
                }
            }
            (Question::SubmitOther { .. }, Reply::Refused(Refusal { code: RefusalCode::Conflict, .. })) => {}
            (Question::Submit { key, spec }, Reply::Refused(Refusal { code: RefusalCode::Conflict, message, .. })) => {
                let jobs = self.cluster().jobs();
                let taken = jobs.by_key(&owner, key).is_some_and(|job| !same(&job.spec, spec));
                if !taken {
                    self.oracle.note("I7", || format!("{key:?} with its own spec is refused: {message}"));
                }
            }
            (Question::SubmitForbidden { .. }, Reply::Refused(Refusal { code: RefusalCode::Forbidden, .. })) => {}
            (Question::Cancel { .. }, Reply::Cancelled { .. }) => {}
            (Question::Cancel { .. }, Reply::Refused(Refusal { code, .. })) => {
                if code != RefusalCode::Conflict && code != RefusalCode::Forbidden {
                    self.oracle.note("I6", || format!("a job that was acknowledged cannot be cancelled: {code:?}"));
                }
            }
            (Question::Scale { .. }, Reply::Scaled { .. }) => {}
            (Question::Scale { .. }, Reply::Refused(Refusal { code, .. })) => {
                if code != RefusalCode::Conflict && code != RefusalCode::Forbidden {
                    self.oracle.note("I6", || format!("a job that was acknowledged cannot be resized: {code:?}"));
                }
            }
            (Question::Revoke { .. }, Reply::TokenRevoked { .. }) => {}
            // It was revoked when it was asked before.
            (Question::Revoke { .. }, Reply::Refused(Refusal { code: RefusalCode::Conflict, .. })) => {}
            (Question::Shelf(_), Reply::Pinned(_) | Reply::Pruned { .. }) => {}
            (
                Question::Shelf(_),
                Reply::Refused(Refusal { code: RefusalCode::Forbidden | RefusalCode::NotFound, .. }),
            ) => {}
            (Question::Drain { .. } | Question::Undrain { .. }, Reply::Node(_)) => {}
            (Question::Remove { .. }, Reply::NodeRemoved { .. }) => {}
            // It was removed meanwhile; or it is neither lost nor drained.
            (
                Question::Drain { .. } | Question::Undrain { .. } | Question::Remove { .. },
                Reply::Refused(Refusal { code: RefusalCode::NotFound | RefusalCode::Conflict, .. }),
            ) => {}
            (Question::Look(_), Reply::Job(view)) => {
                if view.state.is_terminal() {
                    self.oracle.shown.insert(view.job, view.state);
                }
            }
            (Question::Look(_), Reply::Refused(refusal)) => {
                self.oracle.note("I6", || format!("a question is refused: {}", refusal.message));
            }
            (Question::Look(_), _) => {}
            (question, reply) => {
                let (question, reply) = (format!("{question:?}"), short(&reply));
                self.oracle.note("I32", || format!("{question} is answered by {reply}"));
            }
        }
        false
    }
}

fn key_text(key: u64) -> String {
    format!("key-{key}")
}

/// Two texts of one spec.
fn same(canonical: &str, text: &str) -> bool {
    stoke_protocol::spec::JobSpec::parse(text).is_ok_and(|spec| spec.to_toml() == canonical)
}

fn short(what: &impl std::fmt::Debug) -> String {
    let mut text = format!("{what:?}");
    if let Some((at, _)) = text.char_indices().nth(120) {
        text.truncate(at);
    }
    text
}
