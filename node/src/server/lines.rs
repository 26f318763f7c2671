//! What has come to a rank from the others and was not used yet, and the way to them. Owns the order in which frames are taken, and what ends a
//! generation while one is waited for; knows nothing of models.
//!
//! B3: frames go to ranks that were met. B7: batches are computed in the order of their numbers; whoever sends anything else ends the generation.

use std::collections::VecDeque;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use stoke_protocol::codec::{self, FrameCap};
use stoke_protocol::message::serve::{StageHeader, StagePart};

use super::kept::Copies;
use super::links::{Frame, Links};
use super::split::Spot;
use super::{Event, Gone, Post};
use crate::worker::text_of;

pub struct Lines {
    pub spot: Spot,
    /// Of every rank's cache.
    pub pages: u32,
    pub copies: Copies,
    pub links: Option<Links>,
    /// Frames that nobody has asked for yet, in the order in which they came.
    pub frames: VecDeque<Frame>,
    /// What is for the head, and came while it waited for something else.
    pub aside: VecDeque<Event>,
}

impl Lines {
    pub fn new(spot: Spot, pages: u32) -> Self {
        let (frames, aside) = Default::default();
        Self { spot, pages, copies: Copies::default(), links: None, frames, aside }
    }

    pub fn queued(&self, to: u32) -> usize {
        self.links.as_ref().map_or(0, |links| links.queued(to))
    }

    pub fn send(&self, to: u32, (batch, part): (u64, StagePart), bytes: Bytes) {
        if let Some(links) = &self.links {
            let header = StageHeader { term: links.term(), batch, part, bytes: bytes.len() as u32 };
            links.send(to, header, bytes);
        }
    }

    /// Keeps a frame of this generation, and ends on what ends it. Gives back what is for the head.
    pub fn sort(&mut self, event: Event) -> Result<Option<Event>, Gone> {
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
    pub fn take_late(&mut self, post: &Post<'_>) -> Result<(), Gone> {
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

    pub fn send_message<M: Serialize>(&self, to: u32, part: StagePart, message: &M) -> Result<(), Gone> {
        let bytes = codec::encode(message, FrameCap::Batch).map_err(|error| Gone::Failed(text_of(&error)))?;
        self.send(to, (0, part), bytes.into());
        Ok(())
    }

    pub fn take_message<M: DeserializeOwned>(
        &mut self,
        post: &Post<'_>,
        from: u32,
        part: StagePart,
    ) -> Result<M, Gone> {
        let frame = self.take(post, from)?;
        expect(&frame, (0, part))?;
        codec::decode(&frame.bytes, FrameCap::Batch).map_err(|error| Gone::Failed(text_of(&error)))
    }

    /// Waits for the next frame of a rank.
    pub fn take(&mut self, post: &Post<'_>, from: u32) -> Result<Frame, Gone> {
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

/// B7.
pub fn expect(frame: &Frame, (number, part): (u64, StagePart)) -> Result<(), Gone> {
    let Frame { from, header: StageHeader { batch, part: found, .. }, .. } = *frame;
    match (batch, found) == (number, part) {
        true => Ok(()),
        false => Err(wrong(number, &format!("rank {from} sent {found:?} of batch {batch} for its {part:?}"))),
    }
}

pub fn disagree(what: &str) -> Gone {
    Gone::Failed(format!("the head and this rank disagree about the {what} that the generation begins with"))
}

pub fn wrong(batch: u64, problem: &str) -> Gone {
    Gone::Failed(format!("batch {batch} cannot be computed: {problem}"))
}
