//! What every stage must know of a batch: its rows, where their keys and values lie, and which of them ask for a token. Made by the head, computed
//! by every rank in the order of the numbers. Owns the check of one that comes from a peer; moves nothing.

use super::pages::Named;
use crate::lm::Sampling;
use crate::lm::kernels::Cache;

/// Rows that are computed together.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Batch {
    /// One more than that of the batch before.
    pub number: u64,
    /// Of each sequence in it, its pages up to its last row.
    pub tables: Vec<Vec<u32>>,
    pub rows: Vec<BatchRow>,
    /// In ascending order of their rows. The last stage answers with one token for each.
    pub asks: Vec<AskRow>,
    /// Pages that are whole after it.
    pub filled: Vec<Named>,
}

/// One token of a sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchRow {
    /// Which of the tables.
    pub table: u32,
    pub token: u32,
    /// Tokens of the sequence before it.
    pub position: u32,
}

/// A row whose next token is wanted.
#[derive(Clone, PartialEq, Debug)]
pub struct AskRow {
    pub row: u32,
    pub sampling: Sampling,
    /// Of the wanted token in its answer.
    pub index: u64,
    /// The tokens of prompt and answer so far, where the repetition penalty needs them; else empty.
    pub before: Vec<u32>,
}

/// What a stage has room for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    /// Of its cache.
    pub pages: u32,
    /// Tokens of a sequence.
    pub context: u32,
    /// Tokens that the model knows.
    pub vocabulary: u32,
    pub rows_max: u32,
}

/// A batch that no head makes.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("batch {number} cannot be computed: {problem}")]
pub struct WrongBatch {
    pub number: u64,
    pub problem: String,
}

impl Batch {
    /// Refuses what would panic, or take more memory than there is for it.
    pub fn check(&self, room: Room) -> Result<(), WrongBatch> {
        self.problem(room).map_or(Ok(()), |problem| Err(WrongBatch { number: self.number, problem }))
    }

    fn problem(&self, room: Room) -> Option<String> {
        let Room { pages, context, vocabulary, rows_max } = room;
        let (rows, tables) = (self.rows.len(), self.tables.len());
        if rows == 0 || rows > rows_max as usize || tables > rows {
            return Some(format!("{rows} rows of {tables} sequences, not 1 to {rows_max}"));
        }
        for table in &self.tables {
            if table.len() > (context as usize).div_ceil(Cache::PAGE) {
                return Some(format!("a sequence of {} pages, for up to {context} tokens", table.len()));
            }
            if let Some(page) = table.iter().find(|page| **page >= pages) {
                return Some(format!("page {page} of {pages}"));
            }
        }
        if let Some(Named { page, .. }) = self.filled.iter().find(|filled| filled.page >= pages) {
            return Some(format!("page {page} of {pages} is whole"));
        }
        for row in &self.rows {
            let BatchRow { table, token, position } = *row;
            let Some(found) = self.tables.get(table as usize) else {
                return Some(format!("a row of sequence {table} of {tables}"));
            };
            if position as usize >= found.len() * Cache::PAGE || position >= context {
                return Some(format!("position {position} in {} pages, for up to {context} tokens", found.len()));
            }
            if token >= vocabulary {
                return Some(format!("token {token} of {vocabulary}"));
            }
        }
        let mut next = 0;
        for ask in &self.asks {
            if ask.row < next || ask.row as usize >= rows {
                return Some(format!("a token for row {} of {rows}, at or behind {next}", ask.row));
            }
            if ask.before.len() > context as usize {
                return Some(format!("{} tokens before one, where {context} have room", ask.before.len()));
            }
            if let Err(problem) = ask.sampling.check() {
                return Some(problem);
            }
            next = ask.row + 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> Batch {
        let row = |table, position| BatchRow { table, token: 9, position };
        let ask = |row| AskRow { row, sampling: Sampling::default(), index: 0, before: vec![1; 40] };
        Batch {
            number: 7,
            tables: vec![vec![0, 3], vec![2]],
            rows: vec![row(0, 31), row(1, 4), row(1, 5)],
            asks: vec![ask(0), ask(2)],
            filled: vec![Named { page: 3, name: [0; 32] }],
        }
    }

    #[test]
    fn what_would_panic_is_refused() {
        let room = Room { pages: 4, context: 40, vocabulary: 10, rows_max: 3 };
        assert_eq!(sound().check(room), Ok(()));
        type Wrong = (&'static str, fn(&mut Batch));
        let wrong: [Wrong; 14] = [
            ("0 rows", |batch| batch.rows.clear()),
            ("4 rows", |batch| batch.rows.push(batch.rows[0])),
            ("of 4 sequences", |batch| batch.tables.extend([vec![], vec![]])),
            ("a sequence of 4 pages", |batch| batch.tables[0].extend([0, 0])),
            ("page 4 of 4", |batch| batch.tables[1][0] = 4),
            ("page 4 of 4 is whole", |batch| batch.filled[0].page = 4),
            ("sequence 2 of 2", |batch| batch.rows[2].table = 2),
            ("position 16 in 1 pages", |batch| batch.rows[2].position = 16),
            ("position 40 in 3 pages", |batch| {
                batch.tables[0].push(1);
                batch.rows[0].position = 40;
            }),
            ("token 10 of 10", |batch| batch.rows[0].token = 10),
            ("row 3 of 3", |batch| batch.asks[1].row = 3),
            ("row 0 of 3, at or behind 1", |batch| batch.asks[1].row = 0),
            ("41 tokens before", |batch| batch.asks[0].before.push(0)),
            ("temperature is NaN", |batch| batch.asks[0].sampling.temperature = f32::NAN),
        ];
        for (words, change) in wrong {
            let mut batch = sound();
            change(&mut batch);
            let error = batch.check(room).unwrap_err().to_string();
            assert!(error.starts_with("batch 7 cannot be computed: ") && error.contains(words), "{error} for {words}");
        }
    }
}
