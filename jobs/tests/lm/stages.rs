//! A model over several ranks, each a thread here: any number of stages and of shares of each layer gives the bits of the whole, for requests that
//! come and go and begin anew.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;

use stoke_jobs::lm::engine::{Ask, Batch, Head, Limits, Request, Stage};
use stoke_jobs::lm::kernels::{Cache, Rows};
use stoke_jobs::lm::{Decoder, Interrupted, ModelError, Precision, Sampling, Share, Sum, Weights, tree};

use crate::common::{File, Tensor, golden, ids, model, u32};

const CONTEXT: usize = 128;
const PAGES: u32 = 18;
const ROWS_MAX: usize = 24;
const TOKENS_MAX: usize = 6;

fn smollm2() -> Weights {
    Weights::open(&model("smollm2-135m-instruct").join("SmolLM2-135M-Instruct.Q4_1.gguf")).unwrap()
}

fn qwen2() -> Weights {
    Weights::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/golden/lm/qwen2")).unwrap()
}

/// Brings the sums of the shares of a stage together: each gives its own to all, itself too.
struct Mesh {
    leaves: usize,
    width: usize,
    to: Vec<Sender<Vec<Vec<f32>>>>,
    from: Vec<Receiver<Vec<Vec<f32>>>>,
}

impl Mesh {
    /// One for each of so many shares.
    fn new(parts: usize, (leaves, width): (usize, usize)) -> Vec<Self> {
        let none = |_| Self { leaves, width, to: Vec::new(), from: Vec::new() };
        let mut meshes: Vec<Self> = (0..parts).map(none).collect();
        for (from, to) in (0..parts).flat_map(|from| (0..parts).map(move |to| (from, to))) {
            let (sender, receiver) = channel();
            meshes[from].to.push(sender);
            meshes[to].from.push(receiver);
        }
        meshes
    }
}

impl Sum for Mesh {
    fn sum(&mut self, partials: &mut [Rows]) -> Result<(), Interrupted> {
        let own: Vec<Vec<f32>> = partials.iter().map(|rows| rows.values.clone()).collect();
        for to in &self.to {
            to.send(own.clone()).map_err(|_| Interrupted)?;
        }
        let mut all = Vec::new();
        for from in &self.from {
            let rows = |values| {
                let mut rows = Rows::new(self.width);
                rows.values = values;
                rows
            };
            all.push(from.recv().map_err(|_| Interrupted)?.into_iter().map(rows).collect());
        }
        tree::root(self.leaves, &mut all).expect("the nodes of all shares cover the tree");
        partials[0].values.copy_from_slice(&all[0][0].values);
        Ok(())
    }
}

/// A batch as it comes to a rank: the first stage makes the rows itself.
type Work = (Batch, Option<Vec<f32>>);

/// What the last stage answers: the tokens, and the bits of the logits that each was chosen from.
struct Chosen {
    number: u64,
    tokens: Vec<u32>,
    logits: Vec<Vec<u32>>,
}

/// The ranks of a gang. They end when nobody can send any more.
struct Ranks {
    to: Vec<Sender<Work>>,
    from: Receiver<Chosen>,
}

impl Ranks {
    fn start<'s, 'w: 's>(scope: &'s Scope<'s, 'w>, weights: &'w Weights, (stages, parts): (usize, usize)) -> Self {
        let config = weights.config().unwrap();
        let (chosen, from) = channel();
        // From the last stage to the first.
        let mut next: Vec<Option<Sender<Work>>> = vec![None; parts];
        for layers in config.stages(stages).unwrap().into_iter().rev() {
            for (part, mut mesh) in Mesh::new(parts, (config.kv_heads, config.hidden)).into_iter().enumerate() {
                let share = Share { part, parts };
                let decoder = Decoder::new(weights, layers.clone(), CONTEXT, Precision::Rounded, share).unwrap();
                let stage = Stage::new(decoder, PAGES, ROWS_MAX as u32);
                let (sender, work) = channel();
                let next = next[part].replace(sender);
                let chosen = (part == 0).then(|| chosen.clone());
                scope.spawn(move || rank(stage, &mut mesh, &work, (next, chosen)));
            }
        }
        Self { to: next.into_iter().flatten().collect(), from }
    }

    fn send(&self, batch: &Batch) {
        self.to.iter().for_each(|to| to.send((batch.clone(), None)).unwrap());
    }
}

fn rank(
    mut stage: Stage<'_>,
    mesh: &mut Mesh,
    work: &Receiver<Work>,
    (next, chosen): (Option<Sender<Work>>, Option<Sender<Chosen>>),
) {
    for (batch, values) in work {
        batch.check(stage.room()).unwrap();
        let mut rows = Rows::new(stage.width());
        match values {
            Some(values) => rows.values = values,
            None => rows = stage.embed(&batch),
        }
        stage.forward(&batch, &mut rows, mesh).unwrap();
        if let Some(next) = &next {
            next.send((batch, Some(rows.values))).unwrap();
        } else if let Some(chosen) = &chosen {
            let logits = stage.logits(&batch, &rows);
            let bits = |row| logits.row(row).iter().map(|logit: &f32| logit.to_bits()).collect();
            let logits = (0..batch.asks.len()).map(bits).collect();
            let (number, tokens) = (batch.number, stage.choose(&batch, &rows));
            // The head may have begun anew and be done.
            let _ = chosen.send(Chosen { number, tokens, logits });
        }
    }
}

/// What happens to a request beside its tokens.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// The head begins anew, and a request is taken back, while batches are under way.
    Resets,
}

/// Of each token of each request, which it is and from what it was chosen.
type Answers = BTreeMap<(u64, usize), (u32, Vec<u32>)>;

/// The answers of a gang to prompts of which another comes with each batch.
fn answers(weights: &Weights, grid: (usize, usize), prompts: &[Vec<u32>], trouble: Trouble) -> Answers {
    let limits = Limits { running_max: 4, rows_max: ROWS_MAX, batches_max: grid.0, waiting_max: 16, context: CONTEXT };
    let drawn = Sampling { temperature: 0.8, top_p: 0.9, repetition_penalty: 1.1, seed: 7, ..Sampling::default() };
    let ask = |(id, prompt): (u64, &Vec<u32>)| {
        let request = Request { id, prompt: prompt.clone(), answered: Vec::new(), tokens_max: TOKENS_MAX };
        let sampling = if id.is_multiple_of(2) { Sampling::default() } else { drawn.clone() };
        Ask { request, sampling, last: Vec::new() }
    };
    let mut asks = (0..).zip(prompts).map(ask);
    let (mut found, mut head) = (Answers::new(), Head::new(PAGES, limits));
    // What every rank has of whole pages when all batches have come through.
    let mut named = BTreeMap::new();
    std::thread::scope(|scope| {
        let ranks = Ranks::start(scope, weights, grid);
        loop {
            let came = asks.next().map(|ask| head.submit(ask).unwrap());
            while let Some(batch) = head.plan() {
                ranks.send(&batch);
                batch.rows.iter().for_each(|row| {
                    named.remove(&batch.tables[row.table as usize][row.position as usize / Cache::PAGE]);
                });
                named.extend(batch.filled.iter().map(|filled| (filled.page, *filled)));
                if trouble == Trouble::Resets && [4, 9, 25].contains(&batch.number) {
                    let lost = head.under_way();
                    (0..lost).for_each(|_| drop(ranks.from.recv().unwrap()));
                    if batch.number == 4 {
                        named.clear();
                    }
                    head.reset(&named.values().copied().collect::<Vec<_>>());
                }
                if trouble == Trouble::Resets && batch.number == 3 {
                    assert!(head.cancel(1));
                }
            }
            if came.is_none() && head.load() == (0, 0) && head.under_way() == 0 {
                return;
            }
            if head.under_way() > 0 {
                let Chosen { number, tokens, logits } = ranks.from.recv().unwrap();
                let mut of = logits.into_iter().zip(&tokens);
                for made in head.computed(number, &tokens).unwrap() {
                    // Those of a request that was taken back are in between.
                    let logits = of.find(|(_, token)| **token == made.token).unwrap().0;
                    let index = found.range((made.id, 0)..=(made.id, usize::MAX)).count();
                    found.insert((made.id, index), (made.token, logits));
                }
            }
        }
    });
    found.retain(|(id, _), _| trouble == Trouble::None || *id != 1);
    found
}

#[test]
fn every_cut_of_smollm2_gives_the_bits_of_the_whole() {
    let weights = smollm2();
    let golden = golden("smollm2.json");
    let prompts = golden["prompts"].as_array().unwrap()[..5].iter().map(|prompt| ids(&prompt["prompt"]));
    let prompts: Vec<Vec<u32>> = prompts.collect();
    let whole = answers(&weights, (1, 1), &prompts, Trouble::None);
    assert_eq!(whole.len(), prompts.len() * TOKENS_MAX);
    for grid in [(2, 1), (3, 1), (1, 2), (2, 2), (1, 3)] {
        assert!(answers(&weights, grid, &prompts, Trouble::None) == whole, "{grid:?}");
    }
    let mut left = whole;
    left.retain(|(id, _), _| *id != 1);
    assert!(answers(&weights, (3, 2), &prompts, Trouble::Resets) == left, "begun anew");
}

#[test]
fn every_cut_of_a_qwen2_gives_the_bits_of_the_whole() {
    let weights = qwen2();
    let prompts: Vec<Vec<u32>> = (0..9).map(|prompt| (0..7 + 11 * prompt).map(|at| at * 13 % 64).collect()).collect();
    let whole = answers(&weights, (1, 1), &prompts, Trouble::None);
    let mut left = whole.clone();
    left.retain(|(id, _), _| *id != 1);
    for grid in [(1, 1), (2, 1), (1, 2), (2, 2)] {
        assert!(answers(&weights, grid, &prompts, Trouble::None) == whole, "{grid:?}");
        assert!(answers(&weights, grid, &prompts, Trouble::Resets) == left, "{grid:?} begun anew");
    }
}

/// A llama of one layer with two heads of 16 values: in blocks of 32, its attention's output cannot be cut.
fn small_heads() -> Weights {
    let mut file = File::small();
    file.key("llama.attention.head_count_kv", u32(2));
    let tensor = |(name, dimensions, kind, bytes): (&str, Vec<u64>, u32, usize)| Tensor {
        name: name.into(),
        dimensions,
        kind,
        bytes: vec![0; bytes],
        offset: None,
    };
    let square = 32 * 32 * 4;
    let tensors = [
        ("token_embd.weight", vec![32, 8], 0, 32 * 8 * 4),
        ("output_norm.weight", vec![32], 0, 128),
        ("blk.0.attn_norm.weight", vec![32], 0, 128),
        ("blk.0.attn_q.weight", vec![32, 32], 0, square),
        ("blk.0.attn_k.weight", vec![32, 32], 0, square),
        ("blk.0.attn_v.weight", vec![32, 32], 0, square),
        ("blk.0.attn_output.weight", vec![32, 32], 8, 32 * 34),
        ("blk.0.ffn_norm.weight", vec![32], 0, 128),
        ("blk.0.ffn_gate.weight", vec![32, 64], 0, 2 * square),
        ("blk.0.ffn_up.weight", vec![32, 64], 0, 2 * square),
        ("blk.0.ffn_down.weight", vec![64, 32], 0, 2 * square),
    ];
    file.tensors = tensors.map(tensor).into();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    Weights::open(&path).unwrap()
}

#[test]
fn layers_that_cannot_be_cut_so_are_refused() {
    let (smollm2, small) = (smollm2(), small_heads());
    let new = |weights, layers, parts| {
        let share = Share { part: 0, parts };
        Decoder::new(weights, 0..layers, 16, Precision::Rounded, share).map(|_| ())
    };
    let error = new(&smollm2, 30, 4).unwrap_err();
    assert!(matches!(error, ModelError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("into 4 parts, where it has 3 heads of keys and values"), "{error}");
    new(&small, 1, 1).unwrap();
    let error = new(&small, 1, 2).unwrap_err().to_string();
    assert!(error.contains("model.layers.0.self_attn.o_proj.weight (Q8_0) between heads"), "{error}");
    assert!(error.contains("16 columns each") && error.contains("(help: use one part and more stages"), "{error}");
}
