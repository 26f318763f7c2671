//! Layers of a model at work: batches in, rows or tokens out. Owns the keys and values of its layers; what a batch is made of is the head's
//! (`head.rs`), and how it comes here its caller's. Blocks while it computes; one thread owns it.
//!
//! A page has its name here from the batch that fills it to the next one that writes to it: what it holds is known without whoever planned it (G4).
//!
//! H4: every batch that was planned is computed by every stage, in the order of the numbers, or the head begins anew (`Head::reset`).

use super::batch::{Batch, Room};
use super::pages::{Name, Named};
use crate::lm::Decoder;
use crate::lm::decoder::{Interrupted, Memory, Sum};
use crate::lm::kernels::{Cache, Place, Rows};

/// A decoder with its cache. The first stage embeds, all take rows forward, the last one chooses.
pub struct Stage<'w> {
    decoder: Decoder<'w>,
    memory: Memory,
    room: Room,
    /// Of each page of the cache, with how many had been named before.
    names: Vec<Option<(Name, u64)>>,
    named: u64,
    /// What is asked of the last stage; kept for its room.
    asking: Rows,
}

impl<'w> Stage<'w> {
    /// `pages`: of its cache, as many as the head plans with. `rows_max`: of a batch.
    pub fn new(decoder: Decoder<'w>, pages: u32, rows_max: u32) -> Self {
        let (vocab, hidden) = (decoder.config().vocab, decoder.config().hidden);
        let room = Room { pages, context: decoder.context() as u32, vocabulary: vocab as u32, rows_max };
        let (names, asking) = (vec![None; pages as usize], Rows::new(hidden));
        Self { memory: decoder.memory(pages as usize), asking, names, named: 0, decoder, room }
    }

    /// What [`Batch::check`] is to look at, where a batch comes from a peer.
    pub fn room(&self) -> Room {
        self.room
    }

    /// Values of a row that goes from stage to stage.
    pub fn width(&self) -> usize {
        self.decoder.config().hidden
    }

    /// What the first layer takes.
    pub fn embed(&self, batch: &Batch) -> Rows {
        self.decoder.embed(batch.rows.iter().map(|row| row.token))
    }

    /// Takes the rows of a batch through the layers. Interrupted: neither they nor the cache are worth anything until the head begins anew.
    pub fn forward(&mut self, batch: &Batch, rows: &mut Rows, sum: &mut dyn Sum) -> Result<(), Interrupted> {
        let place =
            |row: &super::BatchRow| Place { pages: &batch.tables[row.table as usize], position: row.position as usize };
        let places: Vec<Place<'_>> = batch.rows.iter().map(place).collect();
        for place in &places {
            self.names[place.pages[place.position / Cache::PAGE] as usize] = None;
        }
        self.decoder.forward(rows, &places, &mut self.memory, sum)?;
        batch.filled.iter().for_each(|filled| self.give_name(*filled));
        Ok(())
    }

    fn give_name(&mut self, named: Named) {
        self.names[named.page as usize] = Some((named.name, self.named));
        self.named += 1;
    }

    /// The pages that have names, the newest first.
    pub fn named(&self) -> Vec<Named> {
        let named = |(page, name): (u32, &Option<(Name, u64)>)| name.map(|(name, at)| (at, Named { page, name }));
        let mut found: Vec<(u64, Named)> = (0..).zip(&self.names).filter_map(named).collect();
        found.sort_unstable_by(|left, right| right.cmp(left));
        found.into_iter().map(|(_, named)| named).collect()
    }

    /// Whether a page has this name.
    pub fn has(&self, named: Named) -> bool {
        self.names.get(named.page as usize).copied().flatten().is_some_and(|(name, _)| name == named.name)
    }

    /// The keys and values of a page in this stage's layers.
    pub fn page(&self, page: u32) -> &[f32] {
        self.memory.page(page)
    }

    /// Where the keys and values of a page are to be put that another rank has kept for this one: they are those of its name.
    pub fn restore(&mut self, named: Named) -> &mut [f32] {
        self.give_name(named);
        self.memory.page_mut(named.page)
    }

    /// All other pages lose their names.
    pub fn retain(&mut self, kept: &[Named]) {
        let names = std::mem::replace(&mut self.names, vec![None; self.room.pages as usize]);
        for Named { page, name } in kept {
            self.names[*page as usize] = names[*page as usize].filter(|(found, _)| found == name);
        }
    }

    /// The next token of each row that asks, behind the last layer.
    pub fn choose(&mut self, batch: &Batch, rows: &Rows) -> Vec<u32> {
        if batch.asks.is_empty() {
            return Vec::new();
        }
        let mut logits = self.logits(batch, rows);
        let asks = batch.asks.iter().enumerate();
        asks.map(|(at, ask)| ask.sampling.choose(logits.row_mut(at), &ask.before, ask.index)).collect()
    }

    /// What tokens are chosen from: the logits of each row that asks.
    pub fn logits(&mut self, batch: &Batch, rows: &Rows) -> Rows {
        self.asking.values.clear();
        batch.asks.iter().for_each(|ask| self.asking.values.extend_from_slice(rows.row(ask.row as usize)));
        self.decoder.logits(&self.asking, &mut self.memory)
    }
}
