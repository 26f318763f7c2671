//! Pages of the cache that outlive their generation: each rank keeps copies of the whole pages of the rank before it, and a generation begins with
//! the pages that all ranks have or get back. What a rank that died had computed is not computed again. Owns the copies, what is still to be copied,
//! and what each rank is told at the beginning; computes nothing and moves nothing by itself (`stage.rs`).
//!
//! B11: a generation begins with a page only if every rank has it, or whoever keeps its copy does, under the same number and name. A name stands for
//! all tokens up to the page's last one, so its keys and values are those that computing it again would give (G4). B12: a link has so many bytes of
//! copies to send at a time: rows of batches do not wait behind more.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::{BufMut, Bytes, BytesMut};
use stoke_jobs::lm::engine::{Name, Named};
use stoke_protocol::message::serve::{Held, PageName, Resume};

/// B12.
pub const COPY_BYTES_MAX: usize = 4 << 20;
/// Pages of which a rank tells: what it has of them is in one frame.
const TOLD_MAX: usize = 100_000;
/// A page's number and name, before its values.
const HEAD: usize = size_of::<u32>() + size_of::<Name>();

/// What a rank has for others, and they for it.
#[derive(Default)]
pub struct Copies {
    /// By the number of a page in the cache of the rank before this one. The frame in which it came.
    kept: BTreeMap<u32, (Name, Bytes)>,
    /// Pages of this rank's own cache, in the order in which they are to be copied.
    waiting: VecDeque<Named>,
}

impl Copies {
    pub fn kept(&self) -> impl Iterator<Item = Named> + '_ {
        self.kept.iter().map(|(page, (name, _))| Named { page: *page, name: *name })
    }

    /// Takes a page of the rank before, of a cache with so many. False: it is none.
    pub fn keep(&mut self, frame: Vec<u8>, pages: u32) -> bool {
        let Some((Named { page, name }, _)) = parts(&frame).filter(|(named, _)| named.page < pages) else {
            return false;
        };
        self.kept.insert(page, (name, frame.into()));
        true
    }

    /// The frame in which a page came that is to go back.
    pub fn give(&self, page: u32) -> Option<Bytes> {
        self.kept.get(&page).map(|(_, frame)| frame.clone())
    }

    /// All others are forgotten.
    pub fn retain(&mut self, pages: &[Named]) {
        let pages: BTreeSet<&Named> = pages.iter().collect();
        self.kept.retain(|page, (name, _)| pages.contains(&Named { page: *page, name: *name }));
    }

    /// Nothing else is to be copied.
    pub fn begin(&mut self, copy: Vec<Named>) {
        self.waiting = copy.into();
    }

    /// More to copy. `is_there`: whether a page still is what it was.
    pub fn add(&mut self, filled: &[Named], is_there: impl Fn(Named) -> bool) {
        self.waiting.extend(filled);
        // What no link takes does not grow for ever.
        if self.waiting.len() > TOLD_MAX {
            self.waiting.retain(|named| is_there(*named));
        }
    }

    /// The next page to copy.
    pub fn next(&mut self, is_there: impl Fn(Named) -> bool) -> Option<Named> {
        std::iter::from_fn(|| self.waiting.pop_front()).find(|named| is_there(*named))
    }
}

/// Which pages are moved to ranks that lack them: others are not worth the time that everybody waits.
pub enum Worth {
    /// Those that requests have use of.
    Names(BTreeSet<Name>),
    /// So many: the newest, where the head is new and has no requests yet.
    Newest(usize),
}

/// What each rank begins with, from what each has told; in the order of the ranks.
pub fn plan(told: &[Held], worth: &Worth) -> Vec<Resume> {
    let set = |pages: &[PageName]| pages.iter().copied().collect::<BTreeSet<PageName>>();
    let own: Vec<BTreeSet<PageName>> = told.iter().map(|held| set(&held.own)).collect();
    // Of each rank's own pages.
    let copies: Vec<BTreeSet<PageName>> =
        (0..told.len()).map(|rank| set(&told[(rank + 1) % told.len()].kept)).collect();
    let lacks = |page: &PageName| own.iter().filter(|own| !own.contains(page)).count();
    let is_whole =
        |page: &&PageName| own.iter().zip(&copies).all(|(own, copies)| own.contains(*page) || copies.contains(*page));
    let mut ages = BTreeMap::<PageName, usize>::new();
    for (age, page) in told.iter().flat_map(|held| held.own.iter().enumerate()) {
        ages.entry(*page).and_modify(|least| *least = age.min(*least)).or_insert(age);
    }
    let (mut numbers, mut names, mut moved) = (BTreeSet::new(), BTreeSet::new(), 0);
    // Where a number or a name is there twice, the one that more ranks have.
    let mut whole: Vec<PageName> = own[0].union(&copies[0]).filter(is_whole).copied().collect();
    whole.sort_by_key(|page| (lacks(page), ages.get(page).copied().unwrap_or(usize::MAX), page.page));
    whole.retain(|page| {
        moved += usize::from(lacks(page) > 0);
        let is_worth = match worth {
            Worth::Names(names) => names.contains(&page.name),
            Worth::Newest(most) => moved <= *most,
        };
        (lacks(page) == 0 || is_worth)
            && !numbers.contains(&page.page)
            && names.insert(page.name)
            && numbers.insert(page.page)
    });
    whole.sort_unstable();
    let numbers = |pages: &mut dyn Iterator<Item = &PageName>| pages.map(|page| page.page).collect::<Vec<_>>();
    let lacking = |rank: usize| numbers(&mut whole.iter().filter(|page| !own[rank].contains(*page)));
    let resume = |rank: usize| Resume {
        pages: whole.clone().into(),
        lacking: lacking(rank).into(),
        give: lacking((rank + told.len() - 1) % told.len()).into(),
        copy: numbers(&mut whole.iter().filter(|page| !copies[rank].contains(*page))).into(),
    };
    (0..told.len()).map(resume).collect()
}

/// What a rank tells.
pub fn held(own: Vec<Named>, kept: impl Iterator<Item = Named>) -> Held {
    let told = |named: Named| PageName { page: named.page, name: named.name };
    Held { own: own.into_iter().take(TOLD_MAX).map(told).collect(), kept: kept.take(TOLD_MAX).map(told).collect() }
}

/// A page as it travels.
pub fn frame(named: Named, values: &[f32]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(HEAD + size_of_val(values));
    bytes.put_u32_le(named.page);
    bytes.put_slice(&named.name);
    values.iter().for_each(|value| bytes.put_f32_le(*value));
    bytes.freeze()
}

/// The page, and its values as they travel.
pub fn parts(frame: &[u8]) -> Option<(Named, &[u8])> {
    let (page, rest) = frame.split_first_chunk()?;
    let (name, values) = rest.split_first_chunk()?;
    Some((Named { page: u32::from_le_bytes(*page), name: *name }, values))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(page: u32, name: u8) -> PageName {
        PageName { page, name: [name; 32] }
    }

    fn held(own: &[PageName], kept: &[PageName]) -> Held {
        Held { own: own.to_vec().into(), kept: kept.to_vec().into() }
    }

    /// Numbers of pages: all, lacking, to give, to copy.
    fn numbers(told: &[Held]) -> Vec<[Vec<u32>; 4]> {
        let numbers = |resume: Resume| {
            let pages = resume.pages.iter().map(|page| page.page).collect();
            [pages, resume.lacking.0, resume.give.0, resume.copy.0]
        };
        plan(told, &Worth::Newest(2)).into_iter().map(numbers).collect()
    }

    #[test]
    fn what_a_new_rank_lacks_comes_from_the_one_behind_it_and_is_copied_to_it() {
        let [a, b, c] = [page(0, 1), page(1, 2), page(2, 3)];
        let all = [a, b, c];
        // Rank 1 of three is new; what it kept of rank 0's is gone with it, and page 2 of its own had not been copied.
        let told = [held(&all, &all), held(&[], &[]), held(&all, &[a, b])];
        let wanted = [
            [vec![0, 1], vec![], vec![], vec![0, 1]],
            [vec![0, 1], vec![0, 1], vec![], vec![]],
            [vec![0, 1], vec![], vec![0, 1], vec![]],
        ];
        assert_eq!(numbers(&told), wanted);
        // Nobody new, nothing lacks.
        let told = [held(&all, &all), held(&all, &all)];
        assert_eq!(numbers(&told), [[vec![0, 1, 2], vec![], vec![], vec![]], [vec![0, 1, 2], vec![], vec![], vec![]]]);
        // Both ranks of two.
        assert_eq!(numbers(&[held(&[], &[]), held(&[], &[])]), <[[Vec<u32>; 4]; 2]>::default());
    }

    #[test]
    fn pages_that_nobody_has_use_of_are_not_moved() {
        let pages = [page(2, 3), page(1, 2), page(0, 1)];
        // The newest first; the other rank is new.
        let told = [held(&pages, &pages), held(&[], &[])];
        assert_eq!(numbers(&told)[1][1], [1, 2]);
        let names = |worth: &[PageName]| Worth::Names(worth.iter().map(|page| page.name).collect());
        let pages_of = |worth| plan(&told, &worth)[0].pages.iter().map(|page| page.page).collect::<Vec<_>>();
        assert_eq!((pages_of(names(&pages[1..2])), pages_of(names(&[]))), (vec![1], vec![]));
        // What all have costs nothing.
        let told = [held(&pages, &[]), held(&pages, &[])];
        assert_eq!(plan(&told, &names(&[]))[0].pages.len(), 3);
    }

    #[test]
    fn a_page_or_a_name_that_is_there_twice_is_used_once() {
        // Page 0 had another content when it was copied last; the same content lies in page 5 as well.
        let (new, old, twin) = (page(0, 1), page(0, 2), page(5, 1));
        let both = [new, twin];
        let told = [held(&both, &[old]), held(&both, &[old, new])];
        assert_eq!(numbers(&told)[0][0], [0], "the one that needs no copy");
        let told = [held(&[new], &[old]), held(&[old], &[old])];
        assert_eq!(numbers(&told), [[vec![0], vec![0], vec![], vec![]], [vec![0], vec![], vec![0], vec![]]]);
    }

    #[test]
    fn a_page_that_was_written_again_is_not_copied_and_a_frame_that_is_none_not_kept() {
        let named = |page| Named { page, name: [page as u8; 32] };
        let mut copies = Copies::default();
        copies.add(&[named(1), named(2)], |_| true);
        assert_eq!(copies.next(|named| named.page != 1), Some(named(2)));
        assert_eq!(copies.next(|_| true), None);
        let sent = frame(named(3), &[1.0, -2.0]);
        assert!(copies.keep(sent.to_vec(), 4) && !copies.keep(sent.to_vec(), 3) && !copies.keep(vec![0; 35], 4));
        assert_eq!(copies.give(3), Some(sent.clone()));
        assert_eq!(parts(&sent).map(|(named, values)| (named, values.len())), Some((named(3), 8)));
        copies.retain(&[Named { page: 3, name: [9; 32] }]);
        assert_eq!(copies.kept().count(), 0);
    }
}
