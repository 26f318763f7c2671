//! Which sequence has which pages of the cache of keys and values, and which pages hold a beginning that another sequence can use. Owns the
//! counts; touches no key and no value.
//!
//! | page   | held by  | named | becomes                                                         |
//! | ---    | ---      | ---   | ---                                                             |
//! | free   | nobody   | no    | held, when a table needs one                                    |
//! | held   | 1 or more| no    | named when all its tokens are known; free when nobody holds it  |
//! | named  | 1 or more| yes   | held by more, when a prompt begins the same; idle when by nobody|
//! | idle   | nobody   | yes   | held again by its name; or unnamed and held, oldest first       |
//!
//! G1: a page is in exactly one of the four. G2: two pages never have the same name. G3: a named page is not written any more. G4: so its keys and
//! values are those of its name on every rank, whoever planned them: they outlive the head that named them (`Pages::holding`).

use std::collections::BTreeMap;

/// The tokens of a page and of all pages before it: keys and values depend on nothing else.
pub type Name = [u8; 32];

/// A page that has a name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Named {
    pub page: u32,
    pub name: Name,
}

/// All pages of a cache.
#[derive(Debug)]
pub struct Pages {
    /// Tokens a page.
    size: usize,
    free: Vec<u32>,
    states: Vec<State>,
    named: BTreeMap<Name, u32>,
    /// Named pages that nobody holds, by when they were let go.
    idle: BTreeMap<u64, u32>,
    /// Pages let go so far.
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct State {
    holders: u32,
    name: Option<Name>,
    /// When it became idle.
    since: u64,
}

/// The pages of one sequence, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    pages: Vec<u32>,
    /// The name of the last page that has one, and how many have.
    last: Option<Name>,
    named: usize,
}

impl Table {
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }
}

impl Pages {
    pub fn new(pages: u32, size: usize) -> Self {
        let states = vec![State::default(); pages as usize];
        Self { size, free: (0..pages).rev().collect(), states, named: BTreeMap::new(), idle: BTreeMap::new(), clock: 0 }
    }

    /// The same with pages that have their keys and values already (G4). Those of a number or a name that was there before are left out.
    pub fn holding(pages: u32, size: usize, kept: &[Named]) -> Self {
        let mut holding = Self::new(pages, size);
        for Named { page, name } in kept {
            let is_new = holding.states.get(*page as usize).is_some_and(|state| state.name.is_none());
            if is_new && !holding.named.contains_key(name) {
                holding.named.insert(*name, *page);
                holding.states[*page as usize].name = Some(*name);
                holding.rest(*page);
            }
        }
        holding.free.retain(|page| holding.states[*page as usize].name.is_none());
        holding
    }

    /// Pages that nobody holds.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Tokens a page.
    pub fn size(&self) -> usize {
        self.size
    }

    pub fn len(&self) -> usize {
        self.states.len()
    }

    pub fn is_empty(&self) -> bool {
        self.states.is_empty()
    }

    /// A table for a sequence that begins with `tokens`, with the pages that are there already, and how many tokens those have. The last token is never
    /// among them: what follows it is asked for.
    pub fn begin(&mut self, tokens: &[u32]) -> (Table, usize) {
        let mut table = Table::default();
        let whole = tokens.len().saturating_sub(1) / self.size;
        for name in names(tokens, self.size).take(whole) {
            let Some(page) = self.named.get(&name).copied() else { break };
            self.hold(page);
            table.pages.push(page);
            (table.last, table.named) = (Some(name), table.named + 1);
        }
        let there = table.named * self.size;
        (table, there)
    }

    /// Makes room in a table for so many tokens; whether there were enough pages. If not, the table is as it was.
    pub fn grow(&mut self, table: &mut Table, tokens: usize) -> bool {
        let lacking = tokens.div_ceil(self.size).saturating_sub(table.pages.len());
        if lacking > self.available() {
            return false;
        }
        for _ in 0..lacking {
            let page = self.free.pop().unwrap_or_else(|| self.forget_oldest());
            self.states[page as usize].holders = 1;
            table.pages.push(page);
        }
        true
    }

    /// The keys and values of these tokens, from the first of the sequence on, are in the table's pages: whole pages can be used by others. Gives
    /// those that have their names from now on.
    pub fn computed(&mut self, table: &mut Table, tokens: &[u32]) -> Vec<Named> {
        let mut filled = Vec::new();
        for (at, tokens) in tokens.chunks_exact(self.size).enumerate().skip(table.named) {
            let name = name(table.last, tokens);
            (table.last, table.named) = (Some(name), table.named + 1);
            // G2: where another sequence was first, this page stays this one's.
            let page = table.pages[at];
            if *self.named.entry(name).or_insert(page) == page {
                self.states[page as usize].name = Some(name);
                filled.push(Named { page, name });
            }
        }
        filled
    }

    /// Of pages that nobody holds, those at the beginning of these tokens are the last ones to be taken.
    pub fn prefer(&mut self, tokens: &[u32]) {
        let (table, _) = self.begin(tokens);
        self.end(table);
    }

    /// Lets all pages of a table go.
    pub fn end(&mut self, table: Table) {
        // The first pages last: they are of use to more.
        for page in table.pages.into_iter().rev() {
            let state = &mut self.states[page as usize];
            state.holders = state.holders.checked_sub(1).expect("G1: a held page is let go");
            if state.holders > 0 {
                continue;
            }
            match state.name {
                Some(_) => self.rest(page),
                None => self.free.push(page),
            }
        }
    }

    /// Nobody holds a page that has a name.
    fn rest(&mut self, page: u32) {
        self.clock += 1;
        self.states[page as usize].since = self.clock;
        self.idle.insert(self.clock, page);
    }

    fn hold(&mut self, page: u32) {
        let state = &mut self.states[page as usize];
        if state.holders == 0 {
            self.idle.remove(&state.since);
        }
        state.holders += 1;
    }

    fn forget_oldest(&mut self) -> u32 {
        let (_, page) = self.idle.pop_first().expect("G1: there are as many as were counted");
        let name = self.states[page as usize].name.take().expect("G1: an idle page has a name");
        self.named.remove(&name);
        page
    }

    #[cfg(test)]
    fn check(&self, tables: &[&Table]) {
        let mut holders = vec![0; self.states.len()];
        tables.iter().flat_map(|table| &table.pages).for_each(|page| holders[*page as usize] += 1);
        let mut seen = vec![0; self.states.len()];
        self.free.iter().chain(self.idle.values()).for_each(|page| seen[*page as usize] += 1);
        for (page, state) in self.states.iter().enumerate() {
            assert_eq!(state.holders, holders[page], "G1: holders of {page}");
            assert_eq!(seen[page], u32::from(state.holders == 0), "G1: {page} is in one place");
            if let Some(name) = state.name {
                assert_eq!(self.named[&name], page as u32, "G2");
            }
        }
        assert_eq!(self.named.len(), self.states.iter().filter(|state| state.name.is_some()).count(), "G2");
        assert!(self.free.iter().all(|page| self.states[*page as usize].name.is_none()), "G1: free pages have no name");
    }
}

/// The names of the whole pages of a sequence, from its first one on.
pub(super) fn names(tokens: &[u32], size: usize) -> impl Iterator<Item = Name> {
    tokens.chunks_exact(size).scan(None, |before, tokens| {
        *before = Some(name(*before, tokens));
        *before
    })
}

fn name(before: Option<Name>, tokens: &[u32]) -> Name {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&before.unwrap_or_default());
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};

    use super::*;

    #[test]
    fn a_prompt_that_begins_the_same_uses_the_same_pages() {
        let mut pages = Pages::new(8, 4);
        let first: Vec<u32> = (0..10).collect();
        let (mut table, there) = pages.begin(&first);
        assert_eq!((there, pages.grow(&mut table, 11)), (0, true));
        // Nothing is known of a page before its keys are there.
        assert_eq!(pages.begin(&first).1, 0);
        pages.computed(&mut table, &first);
        let (other, there) = pages.begin(&[&first[..8], &[77, 78]].concat());
        assert_eq!((there, other.pages()), (8, &table.pages()[..2]));
        // Its last token is computed in any case.
        let (third, there) = pages.begin(&first[..8]);
        assert_eq!((there, third.pages().len()), (4, 1));
        // The same tokens after others are not the same.
        assert_eq!(pages.begin(&[&[9], &first[..8]].concat()).1, 0);
        for table in [table, other, third] {
            pages.end(table);
        }
        pages.check(&[]);
        assert_eq!((pages.available(), pages.begin(&first).1), (8, 8), "kept while nobody needs the room");
    }

    #[test]
    fn pages_that_nobody_holds_are_taken_oldest_first_and_held_ones_never() {
        let mut pages = Pages::new(4, 2);
        let made = |pages: &mut Pages, tokens: &[u32]| {
            let (mut table, _) = pages.begin(tokens);
            assert!(pages.grow(&mut table, tokens.len()));
            pages.computed(&mut table, tokens);
            table
        };
        let (old, held, new) = (made(&mut pages, &[1, 2]), made(&mut pages, &[3, 4]), made(&mut pages, &[5, 6]));
        pages.end(old);
        pages.end(new);
        let (mut table, _) = pages.begin(&[7]);
        assert!(!pages.grow(&mut table, 8), "three are left");
        assert!(table.pages().is_empty() && pages.grow(&mut table, 4));
        pages.check(&[&held, &table]);
        assert_eq!(pages.begin(&[1, 2, 0]).1, 0, "the oldest is forgotten");
        assert_eq!(pages.begin(&[5, 6, 0]).1, 2);
    }

    #[test]
    fn pages_that_were_kept_are_found_by_their_names_and_taken_last_where_they_are_preferred() {
        let mut pages = Pages::new(4, 2);
        let (first, second) = ([1, 2, 3, 4, 0], [5, 6, 0]);
        let mut kept = Vec::new();
        for tokens in [&first[..], &second] {
            let (mut table, _) = pages.begin(tokens);
            assert!(pages.grow(&mut table, tokens.len() - 1));
            kept.extend(pages.computed(&mut table, tokens));
        }
        assert_eq!(kept.iter().map(|named| named.page).collect::<Vec<_>>(), [0, 1, 2]);
        // What a peer may say.
        let wrong =
            [Named { page: 9, ..kept[0] }, kept[0], Named { page: 3, ..kept[0] }, Named { page: 0, name: [7; 32] }];
        let mut pages = Pages::holding(4, 2, &[&kept[..], &wrong].concat());
        pages.check(&[]);
        assert_eq!(pages.available(), 4);
        pages.prefer(&first);
        let (mut table, _) = pages.begin(&[9]);
        assert!(pages.grow(&mut table, 4));
        assert_eq!((pages.begin(&second).1, pages.begin(&first).1), (0, 4));
    }

    #[test]
    fn no_page_is_lost_or_held_twice_whatever_comes() {
        for seed in 0..50 {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let mut pages = Pages::new(12, 3);
            let mut sequences: Vec<(Table, Vec<u32>)> = Vec::new();
            for _ in 0..400 {
                let draw = random.next_u32() as usize;
                match draw % 4 {
                    0 => {
                        let tokens: Vec<u32> = (0..1 + draw % 14).map(|_| random.next_u32() % 2).collect();
                        let (mut table, there) = pages.begin(&tokens);
                        assert!(there < tokens.len() && there % 3 == 0);
                        match pages.grow(&mut table, tokens.len()) {
                            true => sequences.push((table, tokens)),
                            false => pages.end(table),
                        }
                    }
                    1 if !sequences.is_empty() => {
                        let (table, _) = sequences.swap_remove(draw / 4 % sequences.len());
                        pages.end(table);
                    }
                    _ if !sequences.is_empty() => {
                        let at = draw / 4 % sequences.len();
                        let (table, tokens) = &mut sequences[at];
                        pages.computed(table, tokens);
                        if pages.grow(table, tokens.len() + 1) {
                            tokens.push(random.next_u32() % 2);
                        }
                    }
                    _ => {}
                }
                pages.check(&sequences.iter().map(|(table, _)| table).collect::<Vec<_>>());
            }
        }
    }
}
