//! How a rank begins a generation with what is left of the one before, and what it does while it computes so that much is left. Owns the exchange
//! of pages; which pages are used is decided in `kept.rs`.

use std::collections::BTreeMap;

use stoke_jobs::lm::engine::{Batch, Named};
use stoke_protocol::message::serve::{Held, PageName, Resume, StagePart};

use super::kept::{self, COPY_BYTES_MAX, Worth};
use super::lines::{disagree, expect};
use super::links::fill;
use super::stage::Worker;
use super::{Gone, Post};

/// Of a rank's cache, moved to it for a head that is new: a second over a slow network.
const RESTORE_BYTES_MAX: usize = 128 << 20;

impl Worker<'_> {
    /// Pages that are whole now go to whoever keeps them, and what the link had no room for before (B12).
    pub(super) fn copy(&mut self, batch: &Batch) {
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

    /// Brings every rank to the same pages (B11), which it gives. `worth` is the head's to say.
    pub fn resume(&mut self, post: &Post<'_>, worth: Option<Worth>) -> Result<Vec<Named>, Gone> {
        if !self.spot.keeps {
            return Ok(Vec::new());
        }
        self.lines.take_late(post)?;
        let held = kept::held(self.stage.named(), self.lines.copies.kept());
        let resume = match worth {
            Some(worth) => self.agree(post, held, &worth)?,
            None => {
                self.lines.send_message(0, StagePart::Held, &held)?;
                self.lines.take_message(post, 0, StagePart::Resume)?
            }
        };
        let named = |page: &PageName| Named { page: page.page, name: page.name };
        let pages: Vec<Named> = resume.pages.iter().map(named).collect();
        let by_number: BTreeMap<u32, Named> = pages.iter().map(|named| (named.page, *named)).collect();
        let find = |numbers: &[u32]| numbers.iter().map(|page| by_number.get(page).copied()).collect();
        let found: (Option<Vec<Named>>, Option<Vec<Named>>) = (find(&resume.lacking), find(&resume.copy));
        let is_sound = by_number.last_key_value().is_none_or(|(page, _)| *page < self.lines.pages);
        let (Some(lacking), Some(copy), true) = (found.0, found.1, is_sound) else { return Err(disagree("pages")) };
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

    /// What a head that is new lets be moved.
    pub fn newest(&self) -> Worth {
        Worth::Newest(RESTORE_BYTES_MAX / size_of_val(self.stage.page(0)))
    }

    /// For the head: what all begin with, from what each has.
    fn agree(&mut self, post: &Post<'_>, own: Held, worth: &Worth) -> Result<Resume, Gone> {
        let mut told = vec![own];
        for rank in 1..self.spot.ranks() {
            told.push(self.lines.take_message(post, rank, StagePart::Held)?);
        }
        let mut plan = kept::plan(&told, worth).into_iter();
        let own = plan.next().expect("a plan has every rank's part");
        (1..).zip(plan).try_for_each(|(rank, resume)| self.lines.send_message(rank, StagePart::Resume, &resume))?;
        Ok(own)
    }
}
