//! A generation comes together: every rank meets those that it has something to say to, tells where it stands, and the sum of the last step
//! goes to those that have not done it; if nobody has a state, it says who reads which part of the checkpoint. Owns the way from a membership to an exchange; what a rank computes is its trainer's.
//!
//! X10: when it is done, every member has done the same steps, or applies the one sum that it was handed, or waits for the state: it became a
//! member with sums of others still on their way, and a failure ended their generation.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::try_join_all;
use stoke_protocol::ids::{Step, Term};
use stoke_protocol::message::peer::{
    Keeps, Kept, Machine, Part, Restores, ShardSet, Sharing, Standing, TensorHeader, Way,
};
use stoke_protocol::message::rank::{Member, Membership, RankId};
use stoke_protocol::spec::RANKS_MAX;
use stoke_protocol::transport::{BulkReceiver, BulkSender, TransportError};
use tokio::time::Instant;

use super::all_reduce::{Exchange, Place, Shape};
use super::buffer::Buffer;
use super::error::ExchangeError;
use super::link::read_values;
use super::machine::{self, Open};
use super::memory::{Layout, Memory};
use super::mesh::{CONNECT_MAX, Mesh, Pair};
use super::plan::{Hosts, PIECE_VALUES_MAX, Plan};
use super::sum::VALUE_BYTES;

/// Where this rank stands, and what it can give.
#[derive(Clone, Default)]
pub struct State {
    /// Steps that it has done; none before it has a state.
    pub step: Option<Step>,
    /// The sum of the last of them.
    pub sum: Option<Bytes>,
    /// The checkpoint that it begins with.
    pub restores: Option<Restores>,
    /// What it keeps of the optimizer's state, where ranks keep parts of it.
    pub keeps: Keeps,
}

/// A generation that stands.
pub struct Formed {
    pub exchange: Exchange,
    /// Steps that every member has done, this one after it applied `catch_up`.
    pub step: Step,
    /// The sum of the step that this rank has not done and others have.
    pub catch_up: Option<Buffer>,
    /// Ranks that need the state: those that join, and members that are too far behind for one sum.
    pub lacking: Vec<RankId>,
    /// Which part of the state this rank gives to each of them, and of how many; none if it lacks the state itself.
    pub gives: Option<(u32, u32)>,
    /// Nobody has the state: all begin with the same checkpoint, and read it together.
    pub readers: Option<Readers>,
    /// What each member has of the optimizer's state after those steps, where ranks keep parts of it.
    pub keeps: Vec<Keeps>,
    /// Peers with whom this rank exchanges values by TCP.
    pub by_tcp: usize,
}

/// Who reads which shard of a checkpoint: those who have it near; one rank reads it from the store if nobody has.
#[derive(Debug, PartialEq, Eq)]
pub struct Readers(Vec<ShardSet>);

impl Readers {
    /// Whether a member reads a shard itself; if not, it is given it.
    pub fn reads(&self, member: u32, shard: u32) -> bool {
        self.giver(shard) == member || self.0[member as usize].contains(shard)
    }

    /// The member that gives a shard to those who do not read it.
    pub fn giver(&self, shard: u32) -> u32 {
        let world = self.0.len() as u32;
        let in_turn = (0..world).map(|offset| (shard + offset) % world);
        let has = |member: &u32| self.0[*member as usize].contains(shard);
        in_turn.clone().find(has).or_else(|| in_turn.clone().next()).expect("a generation has members")
    }
}

/// Where the ranks of a generation stand, by their place: all that a member knows of them, and the same for every member.
struct Standings {
    at: BTreeMap<u32, Standing>,
    world: u32,
    /// Steps that the first of the members have done: the generation goes on there.
    step: Step,
    readers: Option<Readers>,
}

impl Standings {
    fn of(&self, position: u32) -> Option<&Standing> {
        self.at.get(&position)
    }

    /// The first member that has the sum of the last step.
    fn provider(&self) -> Option<u32> {
        let has = |(position, standing): (&u32, &Standing)| {
            (*position < self.world && standing.step == Some(self.step) && standing.has_sum).then_some(*position)
        };
        self.at.iter().find_map(has)
    }

    /// Whether a member has all but the last step, whose sum it can be handed.
    fn lacks_sum(&self, position: u32) -> bool {
        let behind = |standing: &Standing| standing.step.is_some_and(|step| step.0 + 1 == self.step.0);
        position < self.world && self.of(position).is_some_and(behind) && self.provider().is_some()
    }

    fn lacks_state(&self, position: u32) -> bool {
        if position < self.world && self.readers.is_some() {
            return false;
        }
        self.of(position).is_some_and(|standing| standing.step != Some(self.step)) && !self.lacks_sum(position)
    }

    /// What each member has, or will when it has applied the sum that it lacks.
    fn keeps(&self) -> Vec<Keeps> {
        let keeps = |member| {
            let at_step = |standing: &&Standing| standing.step == Some(self.step) || self.lacks_sum(member);
            self.of(member).filter(at_step).map(|standing| standing.keeps).unwrap_or_default()
        };
        (0..self.world).map(keeps).collect()
    }

    /// Who of the members may share memory with whom.
    fn hosts(&self) -> Hosts {
        Hosts::of((0..self.world).map(|member| self.of(member).and_then(|standing| standing.machine)))
    }

    /// The memory that this rank's host shares, if all of them have it.
    async fn share(&self, place: Place, open: Option<Open>, plan: &Plan) -> Option<Memory> {
        let host = plan.host();
        let (layout, first) = (Layout::of(plan)?, *host.first()?);
        let shared = if first == place.position {
            open?.give(layout, host.len() - 1).await
        } else {
            machine::take(&self.of(first)?.door?, layout).await
        };
        match shared {
            Ok(memory) => Some(memory),
            Err(error) => {
                tracing::warn!(position = place.position, %error, "this rank shares no memory with those of its machine");
                None
            }
        }
    }

    /// Members that have the state, this step's or the one before.
    fn givers(&self) -> impl Iterator<Item = u32> {
        (0..self.world).filter(|member| !self.lacks_state(*member))
    }
}

impl Mesh {
    /// Connects to all ranks of the generation that this one needs: members to everybody, a joining rank to the members. Done when every
    /// pair stands and everybody knows where everybody stands, or with the first rank that could not be reached within [`CONNECT_MAX`].
    /// Run it on any runtime.
    pub async fn form(&self, membership: &Membership, own: State, shape: Shape) -> Result<Formed, ExchangeError> {
        let term = membership.term();
        self.enter(term);
        let (place, others) = self.place(membership)?;
        // Who is the first of its machine is known only when all have met.
        let open = self.may_share(place).and_then(|_| Open::new().ok());
        let standing = Standing {
            term,
            step: own.step,
            has_sum: own.sum.is_some(),
            restores: own.restores,
            files: None,
            machine: self.may_share(place),
            door: open.as_ref().map(|open| open.door),
            tcp: self.tcp().port(),
            keeps: own.keeps,
        };
        let deadline = Instant::now() + CONNECT_MAX;
        let meet = |(position, peer): (u32, Member)| async move {
            Ok::<_, ExchangeError>((position, self.meet(&peer, standing, deadline).await?))
        };
        let mut pairs = try_join_all(others.iter().copied().map(meet)).await?;
        let standings = self.standings((place, standing), &pairs)?;
        let (plan, memory) = self.share((term, place, shape), &standings, open, &mut pairs).await?;
        let ways = others.iter().zip(&mut pairs).map(|((_, member), pair)| self.choose_way(term, &plan, member, pair));
        try_join_all(ways).await?;
        let by_tcp = pairs.iter().filter(|(_, pair)| pair.tcp.is_some()).count();
        tracing::info!(own = %self.own(), %term, hosts = plan.hosts(), host = plan.host().len(), by_tcp, "the exchange stands");
        let catch_up = if standings.lacks_sum(place.position) {
            Some(self.take_over(term, &standings, shape, &mut pairs).await?)
        } else {
            self.hand_over((term, own.sum), place, &standings, &mut pairs).await?;
            None
        };
        let lacking = pairs.iter().filter(|(position, _)| standings.lacks_state(*position));
        let lacking = lacking.map(|(_, pair)| pair.peer).collect();
        let count = standings.givers().count() as u32;
        let gives = standings.givers().position(|giver| giver == place.position).map(|index| (index as u32, count));
        let keeps = standings.keeps();
        let Standings { step, readers, .. } = standings;
        let ranks = membership.members.iter().chain(membership.joining.iter()).map(|member| member.id).collect();
        let named = (term, ranks);
        let exchange = Exchange::new(self.io(), named, pairs, (plan, place, shape), (memory, self.counters().clone()));
        Ok(Formed { exchange, step, catch_up, lacking, gives, readers, keeps, by_tcp })
    }

    /// What each host does in memory and what goes from host to host, and the memory of this one. Everybody comes to the same plan (V1).
    async fn share(
        &self,
        (term, place, shape): (Term, Place, Shape),
        standings: &Standings,
        open: Option<Open>,
        pairs: &mut [(u32, Pair)],
    ) -> Result<(Plan, Option<Arc<Memory>>), ExchangeError> {
        let Place { world, observers, position } = place;
        // What is known last is apart only where it would hold the rest up.
        let tail = if shape.early { shape.tail } else { 0 };
        let plan_of = |hosts: &Hosts| Plan::new((shape.values, tail), shape.lanes, (world, observers), position, hosts);
        let (hosts, alone) = (standings.hosts(), Hosts::alone(world));
        let plan = plan_of(&hosts);
        // With so few values some would have nothing to wait for, and not be there when others find that replicas differ (X12).
        if hosts == alone || plan.is_spread() && plan.leaves_out_some() {
            return Ok((plan_of(&alone), None));
        }
        let memory = if plan.host().len() == 1 { None } else { standings.share(place, open, &plan).await };
        let own = Sharing { term, shares: plan.host().len() == 1 || memory.is_some() };
        let told = pairs
            .iter_mut()
            .map(|(position, pair)| async move { Ok::<_, ExchangeError>((*position, tell_sharing(pair, own).await?)) });
        let told = try_join_all(told).await?.into_iter().chain([(position, own.shares)]);
        let lacking: BTreeSet<u32> = told.filter_map(|(rank, shares)| (!shares).then_some(rank)).collect();
        if lacking.is_empty() {
            return Ok((plan, memory.map(Arc::new)));
        }
        tracing::warn!(own = %self.own(), ?lacking, "ranks of one machine share no memory: their values go over the network");
        let plan = plan_of(&hosts.without(|rank| lacking.contains(&rank)));
        let shares = plan.host().len() > 1;
        Ok((plan, memory.filter(|_| shares).map(Arc::new)))
    }

    /// How the values of a generation go to a peer and come from it (M4).
    async fn choose_way(
        &self,
        term: Term,
        plan: &Plan,
        member: &Member,
        (position, pair): &mut (u32, Pair),
    ) -> Result<(), ExchangeError> {
        // Ranks that join only listen, and not for long.
        let speaks = plan.is_told_by(*position) || !plan.heard_from(*position).is_empty();
        let (Some(port), Some(_)) = (pair.standing.tcp.filter(|_| speaks && plan.rank < plan.world), self.tcp().port())
        else {
            return Ok(());
        };
        let peer = pair.peer;
        let chosen = async {
            if self.own() < peer {
                let dialled = self.tcp().dial(member, port, term).await;
                let has_connected = dialled.is_some();
                pair.sender.write_header(&Way { term, tcp: has_connected }).await?;
                Ok((dialled, has_connected && hear_way(pair, term).await?))
            } else if hear_way(pair, term).await? {
                let come = self.tcp().take(member, term).await;
                let come =
                    come.inspect_err(|error| tracing::warn!(own = %self.own(), %peer, %error, "values go by QUIC"));
                let come = come.ok().filter(|_| !self.tcp().is_closed(member));
                let has_come = come.is_some();
                pair.sender.write_header(&Way { term, tcp: has_come }).await?;
                Ok((come, has_come))
            } else {
                Ok((None, false))
            }
        };
        let (tcp, agreed) = chosen.await.map_err(|error| lost(peer, error))?;
        pair.tcp = tcp.filter(|_| agreed).zip(self.connection(peer));
        Ok(())
    }

    /// The machine of this rank, where its generation may exchange through memory. Ranks that join have not the time of the members.
    fn may_share(&self, place: Place) -> Option<Machine> {
        self.machine().filter(|_| place.world > 1 && place.observers == 0)
    }

    /// This rank's place, and those that it meets, with theirs.
    fn place(&self, membership: &Membership) -> Result<(Place, Vec<(u32, Member)>), ExchangeError> {
        let own = self.own();
        let wrong = |reason: &str| ExchangeError::Membership { own, reason: reason.to_owned() };
        let (world, observers) = (membership.members.len() as u32, membership.joining.len() as u32);
        let all: Vec<Member> = membership.members.iter().chain(membership.joining.iter()).copied().collect();
        let mut ids: Vec<RankId> = all.iter().map(|member| member.id).collect();
        ids.sort_unstable();
        if ids.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(wrong("a rank is listed twice"));
        }
        if world == 0 {
            return Err(wrong("nobody owns lanes"));
        }
        let Some(position) = all.iter().position(|member| member.id == own) else {
            return Err(wrong("this rank is not among them"));
        };
        let place = Place { world, observers, position: position as u32 };
        // Ranks that join have nothing to say to each other.
        let met = |position: u32| position != place.position && (!place.is_observer() || position < world);
        Ok((place, (0..).zip(all).filter(|(position, _)| met(*position)).collect()))
    }

    /// Where everybody stands, this rank too.
    fn standings(&self, own: (Place, Standing), pairs: &[(u32, Pair)]) -> Result<Standings, ExchangeError> {
        let (place, standing) = own;
        let others = pairs.iter().map(|(position, pair)| (*position, pair.standing));
        let at: BTreeMap<u32, Standing> = others.chain([(place.position, standing)]).collect();
        let wrong = |reason: String| ExchangeError::Membership { own: self.own(), reason };
        let members: Vec<(&u32, &Standing)> = at.range(..place.world).collect();
        let impossible = |kept: Kept| kept.position >= kept.world || kept.world > RANKS_MAX;
        if let Some((position, _)) = members.iter().find(|(_, standing)| standing.keeps.iter().any(impossible)) {
            return Err(wrong(format!("the member at place {position} keeps a part of the state that there is not")));
        }
        // They are handed what they are to keep.
        let hands_over = members.iter().any(|(_, standing)| standing.step.is_some() && !standing.keeps.is_empty());
        for (position, standing) in &members {
            if standing.step.is_none() && standing.restores.is_none() && !hands_over {
                return Err(wrong(format!("the member at place {position} owns lanes and has no state")));
            }
        }
        let restores: Vec<Restores> = members.iter().filter_map(|(_, standing)| standing.restores).collect();
        // Some may have read it already, and keep a part of it only: all read it together once more.
        let is_beyond =
            |begins: Step| members.iter().any(|(_, standing)| standing.step.is_some_and(|step| step > begins));
        let all_begin = restores.len() == members.len() && !restores.iter().any(|restores| is_beyond(restores.step));
        if let Some(step) = members.iter().filter_map(|(_, standing)| standing.step).max().filter(|_| !all_begin) {
            return Ok(Standings { at, world: place.world, step, readers: None });
        }
        let Some(Restores { step, .. }) = restores.first().copied() else {
            return Err(wrong("nobody owns lanes".into()));
        };
        if let Some(other) = restores.iter().find(|other| other.step != step) {
            return Err(wrong(format!("members begin with the checkpoints of {step} and {}", other.step)));
        }
        let readers = Some(Readers(restores.iter().map(|restores| restores.near).collect()));
        Ok(Standings { at, world: place.world, step, readers })
    }

    /// Hands the sum of the last step to every member that lacks it, if this is the first rank that has it.
    async fn hand_over(
        &self,
        (term, sum): (Term, Option<Bytes>),
        place: Place,
        standings: &Standings,
        pairs: &mut [(u32, Pair)],
    ) -> Result<(), ExchangeError> {
        let Some(sum) = sum.filter(|_| standings.provider() == Some(place.position)) else { return Ok(()) };
        let lacking = pairs.iter_mut().filter(|(position, _)| standings.lacks_sum(*position));
        let give = lacking.map(|(_, pair)| {
            let sum = sum.clone();
            async move {
                let lost = |error| lost(pair.peer, error);
                give_sum(&mut pair.sender, (term, standings.step), sum).await.map_err(lost)
            }
        });
        try_join_all(give).await.map(drop)
    }

    /// The sum of the last step, from the first rank that has it.
    async fn take_over(
        &self,
        term: Term,
        standings: &Standings,
        shape: Shape,
        pairs: &mut [(u32, Pair)],
    ) -> Result<Buffer, ExchangeError> {
        let (own, step) = (self.own(), standings.step);
        let nobody = || ExchangeError::Membership { own, reason: format!("nobody has the sum of {step} any more") };
        let from = |(position, _): &&mut (u32, Pair)| Some(*position) == standings.provider();
        let (_, pair) = pairs.iter_mut().find(from).ok_or_else(nobody)?;
        tracing::info!(%own, peer = %pair.peer, %step, "catching up by one step");
        take_sum(pair, (term, step), shape.values).await
    }
}

/// Tells a peer whether this rank's host shares memory, and hears it of the peer's.
async fn tell_sharing(pair: &mut Pair, own: Sharing) -> Result<bool, ExchangeError> {
    let peer = pair.peer;
    let told = async {
        pair.sender.write_header(&own).await?;
        pair.receiver.read_header::<Sharing>().await
    };
    match told.await.map_err(|error| lost(peer, error))? {
        Some(theirs) if theirs.term == own.term => Ok(theirs.shares),
        _ => Err(ExchangeError::State { peer, problem: "expected whether it shares memory".into() }),
    }
}

/// What a peer says of a connection by TCP.
async fn hear_way(pair: &mut Pair, term: Term) -> Result<bool, TransportError> {
    let way = pair.receiver.read_header::<Way>().await?;
    way.filter(|way| way.term == term).map(|way| way.tcp).ok_or(TransportError::Ended)
}

fn pieces(values: usize) -> impl Iterator<Item = Range<usize>> {
    (0..values).step_by(PIECE_VALUES_MAX).map(move |start| start..(start + PIECE_VALUES_MAX).min(values))
}

fn header((term, step): (Term, Step), piece: &Range<usize>) -> TensorHeader {
    let step = Step(step.0 - 1);
    let (offset, count) = (piece.start as u64, piece.len() as u32);
    TensorHeader { term, step, part: Part::CatchUp, offset, count, replica: None }
}

async fn give_sum(stream: &mut BulkSender, at: (Term, Step), sum: Bytes) -> Result<(), TransportError> {
    for piece in pieces(sum.len() / VALUE_BYTES) {
        stream.write_header(&header(at, &piece)).await?;
        stream.write_chunk(sum.slice(piece.start * VALUE_BYTES..piece.end * VALUE_BYTES)).await?;
    }
    Ok(())
}

async fn take_sum(pair: &mut Pair, at: (Term, Step), values: usize) -> Result<Buffer, ExchangeError> {
    let peer = pair.peer;
    let mut sum = Buffer::new(values);
    for piece in pieces(values) {
        let expected = header(at, &piece);
        let read = read_piece(&mut pair.receiver, &expected, sum.write(piece)).await;
        if !read.map_err(|error| lost(peer, error))? {
            let problem = format!("expected the sum of {} at {}", at.1, expected.offset);
            return Err(ExchangeError::State { peer, problem });
        }
    }
    Ok(sum)
}

async fn read_piece(
    stream: &mut BulkReceiver,
    expected: &TensorHeader,
    out: &mut [f32],
) -> Result<bool, TransportError> {
    if stream.read_header::<TensorHeader>().await?.as_ref() != Some(expected) {
        return Ok(false);
    }
    let values = read_values(stream, size_of_val(out)).await?;
    values.cursor().copy_to(out);
    Ok(true)
}

pub(super) fn lost(peer: RankId, error: TransportError) -> ExchangeError {
    if error.is_given_up() {
        ExchangeError::PeerLeft { peer }
    } else {
        ExchangeError::PeerLost { peer, source: std::sync::Arc::new(error) }
    }
}
