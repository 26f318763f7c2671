//! A generation comes together: every rank meets those that it has something to say to, tells where it stands, and the sum of the last step
//! goes to those that have not done it. Owns the way from a membership to an exchange; what a rank computes is its trainer's.
//!
//! X10: when it is done, every member has done the same steps, or is about to apply the one sum that it was handed.

use std::ops::Range;

use bytes::Bytes;
use futures_util::future::try_join_all;
use stoke_protocol::ids::{Step, Term};
use stoke_protocol::message::peer::{Part, Standing, TensorHeader};
use stoke_protocol::message::rank::{Member, Membership, RankId};
use stoke_protocol::transport::{BulkReceiver, BulkSender, TransportError};
use tokio::time::Instant;

use super::all_reduce::{Exchange, Place, Shape};
use super::buffer::Buffer;
use super::error::ExchangeError;
use super::link::read_values;
use super::mesh::{CONNECT_MAX, Mesh, Pair};
use super::plan::PIECE_VALUES_MAX;
use super::sum::VALUE_BYTES;

/// Where this rank stands, and what it can give.
#[derive(Clone, Default)]
pub struct State {
    /// Steps that it has done; none before it has a state.
    pub step: Option<Step>,
    /// The sum of the last of them.
    pub sum: Option<Bytes>,
}

/// A generation that stands.
pub struct Formed {
    pub exchange: Exchange,
    /// Steps that every member has done, this one after it applied `catch_up`.
    pub step: Step,
    /// The sum of the step that this rank has not done and others have.
    pub catch_up: Option<Buffer>,
    /// Ranks that join and have no state yet.
    pub lacking: Vec<RankId>,
}

impl Mesh {
    /// Connects to all ranks of the generation that this one needs: members to everybody, a joining rank to the members. Done when every
    /// pair stands and everybody knows where everybody stands, or with the first rank that could not be reached within [`CONNECT_MAX`].
    /// Run it on any runtime.
    pub async fn form(&self, membership: &Membership, own: State, shape: Shape) -> Result<Formed, ExchangeError> {
        let term = membership.term();
        self.enter(term);
        let (place, others) = self.place(membership)?;
        let standing = Standing { term, step: own.step, has_sum: own.sum.is_some() };
        let deadline = Instant::now() + CONNECT_MAX;
        let meet = |(position, peer): (u32, Member)| async move {
            Ok::<_, ExchangeError>((position, self.meet(&peer, standing, deadline).await?))
        };
        let mut pairs = try_join_all(others.into_iter().map(meet)).await?;
        let step = self.common_step(membership, place, own.step, &pairs)?;
        let catch_up = match own.step.filter(|_| !place.is_observer()) {
            Some(ours) if ours == step => {
                self.hand_over(term, (step, own.sum), place, &mut pairs).await?;
                None
            }
            Some(_) => Some(self.take_over(term, step, shape, &mut pairs).await?),
            None => None,
        };
        let joins = |position: u32| position >= place.world;
        let lacks = |pair: &Pair| pair.standing.step != Some(step);
        let lacking = pairs.iter().filter(|(position, pair)| joins(*position) && lacks(pair));
        let lacking = lacking.map(|(_, pair)| pair.peer).collect();
        let ranks = membership.members.iter().chain(membership.joining.iter()).map(|member| member.id).collect();
        let named = (term, ranks);
        let exchange = Exchange::new(self.io(), named, pairs, (shape, place), self.counters().clone());
        Ok(Formed { exchange, step, catch_up, lacking })
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

    /// The step at which the generation goes on: the highest of its members.
    fn common_step(
        &self,
        membership: &Membership,
        place: Place,
        own: Option<Step>,
        pairs: &[(u32, Pair)],
    ) -> Result<Step, ExchangeError> {
        let wrong = |reason: String| ExchangeError::Membership { own: self.own(), reason };
        let members = pairs.iter().filter(|(position, _)| *position < place.world);
        let mut highest = own.filter(|_| !place.is_observer());
        for (_, pair) in members {
            let step = pair.standing.step.ok_or_else(|| wrong(format!("{} owns lanes and has no state", pair.peer)))?;
            highest = highest.max(Some(step));
        }
        let highest = highest.ok_or_else(|| wrong("a rank without a state owns lanes".into()))?;
        match own.filter(|_| !place.is_observer()) {
            Some(own) if own.0 + 1 < highest.0 => {
                Err(ExchangeError::Behind { generation: membership.generation, own, others: highest })
            }
            Some(_) | None => Ok(highest),
        }
    }

    /// Hands the sum of the last step to every member that lacks it, if this is the first rank that has it.
    async fn hand_over(
        &self,
        term: Term,
        (step, sum): (Step, Option<Bytes>),
        place: Place,
        pairs: &mut [(u32, Pair)],
    ) -> Result<(), ExchangeError> {
        let Some(sum) = sum else { return Ok(()) };
        if provider(pairs, step).is_some_and(|first| first < place.position) {
            return Ok(());
        }
        let lacking = pairs.iter_mut().filter(|(position, pair)| {
            *position < place.world && pair.standing.step.is_some_and(|theirs| theirs.0 + 1 == step.0)
        });
        let give = lacking.map(|(_, pair)| {
            let sum = sum.clone();
            async move {
                let lost = |error| lost(pair.peer, error);
                give_sum(&mut pair.sender, (term, step), sum).await.map_err(lost)
            }
        });
        try_join_all(give).await.map(drop)
    }

    /// The sum of the last step, from the first rank that has it.
    async fn take_over(
        &self,
        term: Term,
        step: Step,
        shape: Shape,
        pairs: &mut [(u32, Pair)],
    ) -> Result<Buffer, ExchangeError> {
        let own = self.own();
        let nobody = || ExchangeError::Membership { own, reason: format!("nobody has the sum of {step} any more") };
        let from = provider(pairs, step).ok_or_else(nobody)?;
        let (_, pair) = pairs.iter_mut().find(|(position, _)| *position == from).ok_or_else(nobody)?;
        tracing::info!(%own, peer = %pair.peer, %step, "catching up by one step");
        take_sum(pair, (term, step), shape.values).await
    }
}

/// The first member that has the sum of the last of `step` steps.
fn provider(pairs: &[(u32, Pair)], step: Step) -> Option<u32> {
    let has = |pair: &Pair| pair.standing.step == Some(step) && pair.standing.has_sum;
    pairs.iter().filter(|(_, pair)| has(pair)).map(|(position, _)| *position).min()
}

fn pieces(values: usize) -> impl Iterator<Item = Range<usize>> {
    (0..values).step_by(PIECE_VALUES_MAX).map(move |start| start..(start + PIECE_VALUES_MAX).min(values))
}

fn header((term, step): (Term, Step), piece: &Range<usize>) -> TensorHeader {
    let step = Step(step.0 - 1);
    TensorHeader { term, step, part: Part::CatchUp, offset: piece.start as u64, count: piece.len() as u32 }
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
