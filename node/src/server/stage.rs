//! What a rank computes of a batch: its layers, or its part of them together with the other parts of the stage. Owns the order of frames on the way
//! in and the sums between the parts; which requests are in a batch is the head's.
//!
//! What pages of the cache outlive a generation is `kept.rs`'s; they are moved here.
//!
//! B3: frames go to ranks that were met. B7: batches are computed in the order of their numbers; whoever sends anything else ends the generation.

use std::collections::VecDeque;

use serde::Serialize;
use serde::de::DeserializeOwned;
use stoke_jobs::lm::engine::{AskRow, Batch, BatchRow, Named, Stage};
use stoke_jobs::lm::kernels::Rows;
use stoke_jobs::lm::tree::{owned, root, subtrees};
use stoke_jobs::lm::{Decoder, Interrupted, Sampling, Share, Sum};
use stoke_protocol::codec::{self, FrameCap};
use stoke_protocol::message::serve::{self as wire, Held, PageName, Resume, StageHeader, StagePart};
use stoke_protocol::spec::Serve;

use super::kept::{self, COPY_BYTES_MAX, Copies};
use super::links::{Frame, Links, fill, to_bytes};
use super::model::Model;
use super::split::{self, Spot};
use super::{Event, Gone, Post};
use crate::worker::text_of;

/// Rows of a batch: a long prompt is read in parts of so many tokens. Larger ones are hardly faster, keep stages from working side by side, and hold up
/// the tokens of others.
pub const ROWS_MAX: u32 = 64;

/// A rank's layers, and its place among the others.
pub struct Worker<'w> {
    stage: Stage<'w>,
    spot: Spot,
    /// Leaves of the tree in which the parts' sums are added.
    leaves: usize,
    lines: Lines,
}

/// What comes from the other ranks, and the way to them.
struct Lines {
    spot: Spot,
    /// Of every rank's cache.
    pages: u32,
    copies: Copies,
    links: Option<Links>,
    /// Frames that nobody has asked for yet, in the order in which they came.
    frames: VecDeque<Frame>,
    /// What is for the head, and came while it waited for something else.
    aside: VecDeque<Event>,
}

impl<'w> Worker<'w> {
    pub fn new(model: &'w Model, serve: &Serve, spot: Spot) -> Result<Self, String> {
        let layers = split::layers(&model.config, serve.stages)?.swap_remove(spot.stage as usize);
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
        if let Err(gone) = self.resume(post) {
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

    /// Pages that are whole now go to whoever keeps them, and what the link had no room for before (B12).
    fn copy(&mut self, batch: &Batch) {
        if !self.spot.keeps {
            return;
        }
        let (stage, next) = (&self.stage, self.spot.next());
        self.lines.copies.add(&batch.filled, |named| stage.has(named));
        while self.lines.queued(next) < COPY_BYTES_MAX
            && let Some(named) = self.lines.copies.next(|named| stage.has(named))
        {
            let frame = kept::frame(named, stage.page(named.page));
            self.lines.send(next, (batch.number, StagePart::Copied), frame);
        }
    }

    /// Brings every rank to the same pages (B11), which it gives.
    pub fn resume(&mut self, post: &Post<'_>) -> Result<Vec<Named>, Gone> {
        if !self.spot.keeps {
            return Ok(Vec::new());
        }
        self.lines.take_late(post)?;
        let held = kept::held(self.stage.named(), self.lines.copies.kept());
        let resume = if self.spot.is_head() { self.agree(post, held)? } else { self.lines.tell_head(post, &held)? };
        let named = |page: &PageName| Named { page: page.page, name: page.name };
        let pages: Vec<Named> = resume.pages.iter().map(named).collect();
        let find =
            |page: &u32| pages.iter().copied().find(|named| named.page == *page && named.page < self.lines.pages);
        let find_all = |numbers: &[u32]| numbers.iter().map(find).collect::<Option<Vec<Named>>>();
        let (lacking, copy) = find_all(&resume.lacking).zip(find_all(&resume.copy)).ok_or_else(|| disagree("pages"))?;
        self.stage.retain(&pages);
        self.lines.copies.retain(&pages);
        self.lines.copies.begin(copy);
        for page in resume.give.iter() {
            let frame = self.lines.copies.give(*page).ok_or_else(|| disagree("copies"))?;
            self.lines.send(self.spot.before(), (0, StagePart::Restored), frame);
        }
        for named in &lacking {
            let frame = self.lines.take(post, self.spot.next())?;
            expect(&frame, (0, StagePart::Restored))?;
            let values = kept::parts(&frame.bytes).filter(|(found, _)| found == named);
            let is_whole = values.is_some_and(|(_, values)| fill(self.stage.restore(*named), values));
            if !is_whole {
                return Err(disagree("restored values"));
            }
        }
        tracing::info!(pages = pages.len(), restored = lacking.len(), given = resume.give.len(), "resumes");
        Ok(pages)
    }

    /// For the head: what all begin with, from what each has.
    fn agree(&mut self, post: &Post<'_>, own: Held) -> Result<Resume, Gone> {
        let mut told = vec![own];
        for rank in 1..self.spot.ranks() {
            told.push(self.lines.take_message(post, rank, StagePart::Held)?);
        }
        let mut plan = kept::plan(&told).into_iter();
        let own = plan.next().expect("a plan has every rank's part");
        (1..).zip(plan).try_for_each(|(rank, resume)| self.lines.send_message(rank, StagePart::Resume, &resume))?;
        Ok(own)
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

impl Lines {
    fn new(spot: Spot, pages: u32) -> Self {
        let (frames, aside) = Default::default();
        Self { spot, pages, copies: Copies::default(), links: None, frames, aside }
    }

    fn queued(&self, to: u32) -> usize {
        self.links.as_ref().map_or(0, |links| links.queued(to))
    }

    fn send(&self, to: u32, (batch, part): (u64, StagePart), bytes: bytes::Bytes) {
        if let Some(links) = &self.links {
            let header = StageHeader { term: links.term(), batch, part, bytes: bytes.len() as u32 };
            links.send(to, header, bytes);
        }
    }

    /// Keeps a frame of this generation, and ends on what ends it. Gives back what is for the head.
    fn sort(&mut self, event: Event) -> Result<Option<Event>, Gone> {
        let Some(own) = self.links.as_ref().map(Links::term) else { return Ok(None) };
        match event {
            Event::Frame(frame) if frame.header.term == own && frame.header.part == StagePart::Copied => {
                self.keep(frame)?
            }
            Event::Frame(frame) if frame.header.term == own => self.frames.push_back(frame),
            Event::Lost { term, peer, error } if term == own => return Err(Gone::Lost { peer, error }),
            Event::Left { term } if term == own => return Err(Gone::Left),
            Event::Superseded(generation) if generation == own.generation => return Err(Gone::Superseded),
            // Of a generation that is over.
            Event::Frame(_) | Event::Lost { .. } | Event::Left { .. } | Event::Superseded(_) => {}
            Event::Asked(_) | Event::Dropped(_) | Event::Given(_) => return Ok(Some(event)),
        }
        Ok(None)
    }

    fn keep(&mut self, frame: Frame) -> Result<(), Gone> {
        match frame.from == self.spot.before() && self.copies.keep(frame.bytes, self.pages) {
            true => Ok(()),
            false => Err(wrong(frame.header.batch, &format!("rank {} sent a copy of no page", frame.from))),
        }
    }

    /// Copies of the last generation are as good, up to now.
    fn take_late(&mut self, post: &Post<'_>) -> Result<(), Gone> {
        while let Ok(event) = post.inbox.try_recv() {
            match event {
                Event::Frame(frame) if frame.header.part == StagePart::Copied => self.keep(frame)?,
                event => {
                    let aside = self.sort(event)?;
                    self.aside.extend(aside);
                }
            }
        }
        Ok(())
    }

    fn tell_head(&mut self, post: &Post<'_>, held: &Held) -> Result<Resume, Gone> {
        self.send_message(0, StagePart::Held, held)?;
        self.take_message(post, 0, StagePart::Resume)
    }

    fn send_message<M: Serialize>(&self, to: u32, part: StagePart, message: &M) -> Result<(), Gone> {
        let bytes = codec::encode(message, FrameCap::Batch).map_err(|error| Gone::Failed(text_of(&error)))?;
        self.send(to, (0, part), bytes.into());
        Ok(())
    }

    fn take_message<M: DeserializeOwned>(&mut self, post: &Post<'_>, from: u32, part: StagePart) -> Result<M, Gone> {
        let frame = self.take(post, from)?;
        expect(&frame, (0, part))?;
        codec::decode(&frame.bytes, FrameCap::Batch).map_err(|error| Gone::Failed(text_of(&error)))
    }

    /// Waits for the next frame of a rank.
    fn take(&mut self, post: &Post<'_>, from: u32) -> Result<Frame, Gone> {
        loop {
            if let Some(at) = self.frames.iter().position(|frame| frame.from == from) {
                return Ok(self.frames.remove(at).expect("a frame is at its place"));
            }
            let event = post.inbox.recv().map_err(|_| Gone::Left)?;
            let aside = self.sort(event)?;
            self.aside.extend(aside);
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

/// B7.
fn expect(frame: &Frame, (number, part): (u64, StagePart)) -> Result<(), Gone> {
    let Frame { from, header: StageHeader { batch, part: found, .. }, .. } = *frame;
    match (batch, found) == (number, part) {
        true => Ok(()),
        false => Err(wrong(number, &format!("rank {from} sent {found:?} of batch {batch} for its {part:?}"))),
    }
}

fn disagree(what: &str) -> Gone {
    Gone::Failed(format!("the head and this rank disagree about the {what} that the generation begins with"))
}

fn wrong(batch: u64, problem: &str) -> Gone {
    Gone::Failed(format!("batch {batch} cannot be computed: {problem}"))
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
