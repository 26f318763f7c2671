//! What a rank computes of a batch: its layers, or its part of them together with the other parts of the stage. Owns the order of frames on the way
//! in and the sums between the parts; which requests are in a batch is the head's.
//!
//! It waits for frames in `lines.rs`, and begins a generation in `resume.rs`.

use stoke_jobs::lm::engine::{AskRow, Batch, BatchRow, Named, Stage};
use stoke_jobs::lm::kernels::Rows;
use stoke_jobs::lm::tree::{owned, root, subtrees};
use stoke_jobs::lm::{Decoder, Interrupted, Sampling, Share, Sum};
use stoke_protocol::codec::{self, FrameCap};
use stoke_protocol::message::serve::{self as wire, PageName, StagePart};
use stoke_protocol::spec::Serve;

use super::lines::{Lines, expect, wrong};
use super::links::{Links, fill, to_bytes};
use super::model::Model;
use super::split::{self, Spot};
use super::{Event, Gone, Post};
use crate::worker::text_of;

/// Rows of a batch: a long prompt is read in parts of so many tokens. Larger ones are hardly faster, keep stages from working side by side, and hold up
/// the tokens of others.
pub const ROWS_MAX: u32 = 64;

/// A rank's layers, and its place among the others.
pub struct Worker<'w> {
    pub(super) stage: Stage<'w>,
    pub(super) spot: Spot,
    /// Leaves of the tree in which the parts' sums are added.
    leaves: usize,
    pub(super) lines: Lines,
}

impl<'w> Worker<'w> {
    pub fn new(model: &'w Model, serve: &Serve, spot: Spot) -> Result<Self, String> {
        let layers = split::layers(&model.config, serve)?.swap_remove(spot.stage as usize);
        let share = Share { part: spot.part as usize, parts: spot.tensor as usize };
        tracing::info!(from = layers.start, to = layers.end, part = spot.part, of = spot.tensor, "layers of this rank");
        let decoder = Decoder::new(&model.weights, layers, model.context, model.precision, share);
        let decoder = decoder.map_err(|error| text_of(&error))?;
        let stage = Stage::new(decoder, model.pages, ROWS_MAX);
        Ok(Self { stage, spot, leaves: model.config.kv_heads, lines: Lines::new(spot, model.pages) })
    }

    pub fn enter(&mut self, links: Links) {
        self.lines.links = Some(links);
    }

    pub fn leave(&mut self) {
        self.lines.links = None;
        self.lines.frames.clear();
    }

    /// Computes what the head plans, until the generation is over.
    pub fn follow(&mut self, post: &Post<'_>) -> Gone {
        if let Err(gone) = self.resume(post, None) {
            return gone;
        }
        let mut before = None;
        loop {
            match self.follow_one(post, before) {
                Ok(number) => before = Some(number),
                Err(gone) => return gone,
            }
        }
    }

    fn follow_one(&mut self, post: &Post<'_>, before: Option<u64>) -> Result<u64, Gone> {
        let Spot { stage, tensor, .. } = self.spot;
        // The batch comes with the rows; within the first stage from the head, which has no rows before it.
        let from = if stage == 0 { 0 } else { self.spot.rank() - tensor };
        let frame = self.lines.take(post, from)?;
        let number = frame.header.batch;
        if before.is_some_and(|before| number != before + 1) {
            return Err(wrong(number, &format!("it does not follow {before:?}")));
        }
        expect(&frame, (number, StagePart::Batch))?;
        let batch = self.read(number, &frame.bytes)?;
        let mut rows = if stage == 0 { self.stage.embed(&batch) } else { Rows::new(self.stage.width()) };
        if stage > 0 {
            rows.resize(batch.rows.len());
            let hidden = self.lines.take(post, from)?;
            expect(&hidden, (number, StagePart::Hidden))?;
            if !fill(&mut rows.values, &hidden.bytes) {
                return Err(wrong(number, "its rows are not as many as it says"));
            }
        }
        self.compute(post, &batch, rows).map(|_| number)
    }

    /// A batch that has come from another rank.
    fn read(&self, number: u64, bytes: &[u8]) -> Result<Batch, Gone> {
        let batch: wire::Batch =
            codec::decode(bytes, FrameCap::Batch).map_err(|error| wrong(number, &text_of(&error)))?;
        let batch = from_wire(number, batch);
        batch.check(self.stage.room()).map_err(|error| Gone::Failed(text_of(&error)))?;
        Ok(batch)
    }

    /// The head's first step of a batch: its rows at the first layer.
    pub fn begin(&mut self, post: &Post<'_>, batch: &Batch) -> Result<Option<Vec<u32>>, Gone> {
        if self.spot.tensor > 1 {
            let bytes = encoded(batch)?;
            (1..self.spot.tensor)
                .for_each(|part| self.lines.send(part, (batch.number, StagePart::Batch), bytes.clone()));
        }
        let rows = self.stage.embed(batch);
        self.compute(post, batch, rows)
    }

    /// Through this rank's layers, and on to the next rank. The tokens, where the head is the last stage too.
    fn compute(&mut self, post: &Post<'_>, batch: &Batch, rows: Rows) -> Result<Option<Vec<u32>>, Gone> {
        let tokens = self.through(post, batch, rows)?;
        self.copy(batch);
        Ok(tokens)
    }

    fn through(&mut self, post: &Post<'_>, batch: &Batch, mut rows: Rows) -> Result<Option<Vec<u32>>, Gone> {
        let mut gather = Gather {
            lines: &mut self.lines,
            post,
            spot: self.spot,
            leaves: self.leaves,
            batch: batch.number,
            half: 0,
            gone: None,
        };
        let through = post.beat.piece(|| self.stage.forward(batch, &mut rows, &mut gather));
        if let Err(Interrupted) = through {
            return Err(gather.gone.unwrap_or(Gone::Left));
        }
        if !self.spot.is_last_stage() {
            let next = self.spot.rank() + self.spot.tensor;
            self.lines.send(next, (batch.number, StagePart::Batch), encoded(batch)?);
            self.lines.send(next, (batch.number, StagePart::Hidden), to_bytes([&rows.values[..]]));
            return Ok(None);
        }
        if self.spot.part > 0 {
            return Ok(None);
        }
        let tokens = post.beat.piece(|| self.stage.choose(batch, &rows));
        if self.spot.is_head() {
            return Ok(Some(tokens));
        }
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        self.lines.send(0, (batch.number, StagePart::Chosen), bytes.into());
        Ok(None)
    }

    /// For the head: the next event that is its own, if there is one, or waits for one.
    pub fn event(&mut self, post: &Post<'_>, wait: bool) -> Result<Option<Event>, Gone> {
        if let Some(event) = self.lines.aside.pop_front() {
            return Ok(Some(event));
        }
        loop {
            if let Some(frame) = self.lines.frames.pop_front() {
                return Ok(Some(Event::Frame(frame)));
            }
            let event = if wait { post.inbox.recv().ok() } else { post.inbox.try_recv().ok() };
            let Some(event) = event else { return Ok(None) };
            if let Some(event) = self.lines.sort(event)? {
                return Ok(Some(event));
            }
        }
    }
}

/// The sums of the parts of a stage.
struct Gather<'a, 'p> {
    lines: &'a mut Lines,
    post: &'a Post<'p>,
    spot: Spot,
    leaves: usize,
    batch: u64,
    half: u32,
    /// Why a sum did not come.
    gone: Option<Gone>,
}

impl Sum for Gather<'_, '_> {
    fn sum(&mut self, partials: &mut [Rows]) -> Result<(), Interrupted> {
        self.gather(partials).map_err(|gone| {
            self.gone = Some(gone);
            Interrupted
        })
    }
}

impl Gather<'_, '_> {
    fn gather(&mut self, partials: &mut [Rows]) -> Result<(), Gone> {
        let Spot { stage, part, tensor, .. } = self.spot;
        if tensor == 1 {
            return Ok(());
        }
        let part_header = StagePart::Sums { half: self.half };
        self.half += 1;
        let others = || (0..tensor).filter(|other| *other != part);
        let bytes = to_bytes(partials.iter().map(|rows| &rows.values[..]));
        others().for_each(|other| self.lines.send(stage * tensor + other, (self.batch, part_header), bytes.clone()));
        let (width, count) = (partials[0].width, partials[0].values.len());
        let mut all: Vec<Vec<Rows>> = Vec::with_capacity(tensor as usize);
        for other in 0..tensor {
            if other == part {
                all.push(partials.iter_mut().map(|rows| std::mem::replace(rows, Rows::new(width))).collect());
                continue;
            }
            let frame = self.lines.take(self.post, stage * tensor + other)?;
            expect(&frame, (self.batch, part_header))?;
            let nodes = subtrees(self.leaves, &owned(self.leaves, other as usize, tensor as usize)).len();
            let mut made = Vec::with_capacity(nodes);
            let mut bytes = &frame.bytes[..];
            for _ in 0..nodes {
                let mut rows = Rows::new(width);
                rows.values.resize(count, 0.0);
                let Some((its, left)) = bytes.split_at_checked(count * size_of::<f32>()) else {
                    return Err(wrong(self.batch, &format!("part {other} sent fewer sums than it makes")));
                };
                fill(&mut rows.values, its);
                bytes = left;
                made.push(rows);
            }
            if !bytes.is_empty() {
                return Err(wrong(self.batch, &format!("part {other} sent more sums than it makes")));
            }
            all.push(made);
        }
        root(self.leaves, &mut all).ok_or_else(|| wrong(self.batch, "the sums do not fit together"))?;
        partials[0] = all.swap_remove(0).swap_remove(0);
        Ok(())
    }
}

fn encoded(batch: &Batch) -> Result<bytes::Bytes, Gone> {
    let bytes = codec::encode(&to_wire(batch), FrameCap::Batch);
    bytes.map(Into::into).map_err(|error| wrong(batch.number, &text_of(&error)))
}

fn to_wire(batch: &Batch) -> wire::Batch {
    let row = |row: &BatchRow| wire::BatchRow { table: row.table, token: row.token, position: row.position };
    let ask = |ask: &AskRow| {
        let Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed } = ask.sampling;
        let top_k = u32::try_from(top_k).unwrap_or(u32::MAX);
        let sampling = wire::Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed };
        wire::BatchAsk { row: ask.row, index: ask.index, sampling, before: ask.before.clone().into() }
    };
    wire::Batch {
        tables: batch.tables.iter().map(|pages| pages.clone().into()).collect(),
        rows: batch.rows.iter().map(row).collect(),
        asks: batch.asks.iter().map(ask).collect(),
        filled: batch.filled.iter().map(|filled| PageName { page: filled.page, name: filled.name }).collect(),
    }
}

fn from_wire(number: u64, batch: wire::Batch) -> Batch {
    let row = |row: &wire::BatchRow| BatchRow { table: row.table, token: row.token, position: row.position };
    let ask = |ask: wire::BatchAsk| {
        let wire::Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed } = ask.sampling;
        let sampling = Sampling { temperature, top_k: top_k as usize, top_p, min_p, repetition_penalty, seed };
        AskRow { row: ask.row, sampling, index: ask.index, before: ask.before.0 }
    };
    Batch {
        number,
        tables: batch.tables.0.into_iter().map(|pages| pages.0).collect(),
        rows: batch.rows.iter().map(row).collect(),
        asks: batch.asks.0.into_iter().map(ask).collect(),
        filled: batch.filled.iter().map(|filled| Named { page: filled.page, name: filled.name }).collect(),
    }
}
