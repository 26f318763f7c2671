//! Effects that wait for the disk. Owns the rule that no effect outruns the entries before it (I6); knows nothing of what an effect does.

use std::collections::VecDeque;

use stoke_protocol::ids::LogIndex;

/// First in, first out, each with the entry that must be durable before.
pub(super) struct Outbox<T> {
    waiting: VecDeque<(LogIndex, T)>,
    durable: LogIndex,
}

impl<T> Outbox<T> {
    pub fn new(durable: LogIndex) -> Self {
        Self { waiting: VecDeque::new(), durable }
    }

    pub fn push(&mut self, after: LogIndex, item: T) {
        self.waiting.push_back((after, item));
    }

    pub fn durable(&mut self, index: LogIndex) {
        self.durable = self.durable.max(index);
    }

    /// The next one that may go.
    pub fn pop(&mut self) -> Option<T> {
        let (after, _) = self.waiting.front()?;
        if *after > self.durable { None } else { self.waiting.pop_front().map(|(_, item)| item) }
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn index(&self) -> LogIndex {
        self.durable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outruns_its_entries() {
        let mut outbox = Outbox::new(LogIndex(1));
        outbox.push(LogIndex(1), "now");
        outbox.push(LogIndex(3), "later");
        outbox.push(LogIndex(3), "after it");
        assert_eq!(outbox.pop(), Some("now"));
        assert_eq!(outbox.pop(), None);
        outbox.durable(LogIndex(2));
        assert_eq!(outbox.pop(), None);
        outbox.durable(LogIndex(3));
        assert_eq!((outbox.pop(), outbox.pop(), outbox.len()), (Some("later"), Some("after it"), 0));
    }
}
