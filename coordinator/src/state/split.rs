//! How a model that is served is cut over ranks, and where these go: from what its nodes have measured and have free. A decision without memory; which
//! nodes are asked, and when, is `survey.rs`'s.
//!
//! D1: what the spec says (stages, tensor, layers, memory) is kept; only the rest is chosen.
//! D2: the fewest ranks that fit. More of them only where a token is expected to take a fifth less: each rank is one more that can fail, and for more
//!   answers at once there are replicas, which cost no hops.
//! D3: stages get layers in proportion to their measured compute, within their memory, so that none is waited for.
//! D4: parts of a layer exchange sums twice a layer: unasked they are placed on one node, or where a round trip is small against half a layer.

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{Digest, NodeId};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::split::{Split, SplitRank, Surveyed};
use stoke_protocol::spec::{Bytes, JobSpec, RANKS_MAX, Serve};

use super::machine::{Job, Scene, Seat};
use super::members::Room;
use super::words::rank_count;

/// Unasked, a model is not cut into more: its tokens would travel longer than they are computed.
const STAGES_MAX: u32 = 64;
const TENSOR_MAX: u32 = 8;
/// More ranks must leave so many parts of so many of a token's time.
const CLEARLY: (u64, u64) = (4, 5);
/// Unasked, a round trip between parts is at most this part of a layer's time.
const ROUND_TRIP_PART: u64 = 8;
/// From a rank that sends to one that computes with it, without the way between their machines: two processes, encryption, a wake-up.
const HOP_NS: u64 = 100_000;
/// Of a rank beside its weights and its cache: the program, the tokenizer, buffers of connections and of a batch.
const PROCESS_BYTES: u64 = 128 << 20;
/// Tokens of a page of the cache are not more.
const PAGE_MAX: u64 = 64;
/// Rows of a batch that may ask for a token, as in `node/src/server/stage.rs`: each has a value for every token of the vocabulary.
const ROWS_MAX: u64 = 64;

/// Whether the ranks of a job that serves are known.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub enum Cut {
    /// By its spec.
    #[default]
    Written,
    /// Its nodes are asked first.
    Awaited,
    Chosen(Box<Chosen>),
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Chosen {
    pub split: Split,
    /// The spec as its ranks get it: with the cut.
    pub spec: String,
    /// Of all that the cut follows from: jobs of a model that ask alike are cut alike.
    pub asked: Digest,
}

/// A node that has the model, with what it has free.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    pub node: NodeId,
    pub free: Room,
    pub layer_ns: u64,
    pub rtt_us: u32,
}

/// Nodes that share each layer of a stage; one, or several times the same.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Group<'a> {
    members: Vec<&'a Offer>,
    /// For each part.
    memory_bytes: u64,
    /// Of a whole layer, exchanges between the parts included.
    layer_ns: u64,
}

/// A split that fits, while it is compared with others.
struct Candidate<'a> {
    groups: Vec<Group<'a>>,
    layers: Vec<u32>,
    token_ns: u64,
    stage_ns: u64,
}

/// What a plan looks at.
struct Need<'a> {
    serve: &'a Serve,
    ask: Room,
    /// Where the spec says what a rank gets.
    memory_bytes: Option<u64>,
    model: &'a Surveyed,
}

/// Why there is no cut.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Unfit {
    /// Nodes with more room would mend it, or other answers of theirs.
    Short(String),
    /// No node could mend it: the spec does not fit the model.
    Wrong(String),
}

impl Unfit {
    pub fn words(&self) -> &str {
        match self {
            Self::Short(words) | Self::Wrong(words) => words,
        }
    }
}

/// The cut, or what is short.
pub fn split(spec: &JobSpec, model: &Surveyed, offers: &[Offer]) -> Result<Split, Unfit> {
    let serve = spec.serve.as_ref().expect("only jobs that serve are cut");
    let resources = &spec.resources;
    let memory_bytes = resources.memory.map(|memory| memory.0);
    let ask = Room { cpus: resources.cpus, memory_bytes: memory_bytes.unwrap_or(0), gpus: resources.gpus };
    let need = Need { serve, ask, memory_bytes, model };
    need.check().map_err(Unfit::Wrong)?;
    let mut found: Vec<Candidate<'_>> =
        need.tensors().into_iter().flat_map(|parts| need.candidates(parts, offers)).collect();
    // Fewer ranks first; among as many the faster.
    found.sort_by_key(|candidate| (candidate.ranks(), candidate.token_ns));
    let mut found = found.into_iter();
    let Some(fewest) = found.next() else {
        return Err(if need.fits_somewhere() { Unfit::Short(need.short(offers)) } else { Unfit::Wrong(need.unfit()) });
    };
    let (few, slow_ns) = (fewest.ranks(), fewest.token_ns);
    let best = found.fold(fewest, |best, other| {
        let faster = other.token_ns.saturating_mul(CLEARLY.1) <= best.token_ns.saturating_mul(CLEARLY.0);
        if faster { other } else { best }
    });
    let why = match best.ranks() {
        ranks if ranks > few => {
            format!("a token takes {} instead of {} on {few}", milliseconds(best.token_ns), milliseconds(slow_ns))
        }
        _ if serve.said_stages().or(serve.tensor).is_some() => "as the spec says".to_owned(),
        1 => "the whole model fits on one rank".to_owned(),
        _ => "it does not fit on fewer ranks".to_owned(),
    };
    Ok(need.told(&best, why))
}

impl Candidate<'_> {
    fn ranks(&self) -> usize {
        self.groups.iter().map(|group| group.members.len()).sum()
    }
}

impl Need<'_> {
    /// What no nodes could mend.
    fn check(&self) -> Result<(), String> {
        let Surveyed { layers, kv_heads, parts_max, context: trained, .. } = *self.model;
        if let Some(context) = self.serve.context.filter(|context| *context > trained) {
            return Err(format!("context = {context}: the model was trained for {trained} tokens, use at most that"));
        }
        if let Some(parts) = self.serve.tensor.filter(|parts| *parts > parts_max) {
            return Err(format!(
                "tensor = {parts}: the layers of this model can be cut into {parts_max} parts at most ({kv_heads} heads of keys and values)"
            ));
        }
        if let Some(stages) = self.serve.said_stages().filter(|stages| *stages > layers) {
            return Err(format!("stages = {stages}: the model has {layers} layers, use at most {layers}"));
        }
        match self.serve.layers.as_ref().map(|written| written.iter().map(|own| u64::from(*own)).sum::<u64>()) {
            Some(sum) if sum != u64::from(layers) => Err(format!("layers are {sum} together: the model has {layers}")),
            Some(_) | None => Ok(()),
        }
    }

    /// Whether there would be a cut on as many nodes as it may have, each with all the memory in the world.
    fn fits_somewhere(&self) -> bool {
        let nodes = self.serve.said_stages().unwrap_or(STAGES_MAX.min(self.model.layers));
        self.tensors().into_iter().any(|parts| {
            let whole = |of_one: u32| of_one.saturating_mul(parts);
            let memory_bytes = self.memory_bytes.map_or(u64::MAX / 2, |memory| memory.saturating_mul(parts.into()));
            let free = Room { cpus: whole(self.ask.cpus), memory_bytes, gpus: whole(self.ask.gpus) };
            let node =
                |number: u32| Offer { node: NodeId(number.into()), free, layer_ns: u64::from(u32::MAX), rtt_us: 0 };
            let nodes: Vec<Offer> = (0..nodes).map(node).collect();
            !self.candidates(parts, &nodes).is_empty()
        })
    }

    /// What is wrong where no nodes would do.
    fn unfit(&self) -> String {
        let Surveyed { layers, .. } = *self.model;
        let stages = self.serve.said_stages().unwrap_or(STAGES_MAX.min(layers));
        let fewest = match &self.serve.layers {
            Some(written) => written.iter().copied().max().unwrap_or(layers),
            None => layers.div_ceil(stages.max(1)),
        };
        let parts = u64::from(self.tensors().last().copied().unwrap_or(1));
        let request = self.request_bytes(fewest, parts);
        let own = if fewest == 1 { "1 layer".to_owned() } else { format!("{fewest} layers") };
        match self.memory_bytes {
            _ if request > self.serve.cache.0 => format!(
                "cache = \"{}\": keys and values of one request may need {} in a rank with {own}: use at least that, or a smaller context",
                self.serve.cache,
                whole_words(request)
            ),
            Some(memory) => format!(
                "memory = \"{}\": a rank with {own} of this model needs {}: write more, or leave it out and it is chosen",
                Bytes(memory),
                whole_words(self.bytes(fewest, parts, (true, true)).min(self.bytes(fewest, parts, (false, true))))
            ),
            None => format!("the {layers} layers of this model cannot be cut in this way"),
        }
    }

    /// Into how many parts a layer may be cut.
    fn tensors(&self) -> Vec<u32> {
        let Surveyed { kv_heads, parts_max, .. } = *self.model;
        let even = |parts: &u32| kv_heads.is_multiple_of(*parts);
        match self.serve.tensor {
            Some(parts) => vec![parts],
            None => (1..=parts_max.min(TENSOR_MAX)).filter(even).collect(),
        }
    }

    /// Splits with so many parts a layer that fit.
    fn candidates<'a>(&self, parts: u32, offers: &'a [Offer]) -> Vec<Candidate<'a>> {
        let mut before = 0;
        for times in 1.. {
            let groups = self.groups(parts, times, offers);
            if groups.len() == before {
                break;
            }
            before = groups.len();
            let found = self.fitting(parts, groups);
            // Several stages on a node help only where the spec says how many there are, or how much memory each has.
            if !found.is_empty() || self.serve.said_stages().is_none() && self.memory_bytes.is_none() {
                return found;
            }
        }
        Vec::new()
    }

    fn fitting<'a>(&self, parts: u32, mut groups: Vec<Group<'a>>) -> Vec<Candidate<'a>> {
        let most = (RANKS_MAX / parts).min(self.model.layers);
        let (least, most) = match self.serve.said_stages() {
            Some(stages) => (stages, stages),
            None => (1, most.min(STAGES_MAX)),
        };
        let mut found = Vec::new();
        let mut roomy = groups.clone();
        groups.sort_by_key(|group| (group.layer_ns, std::cmp::Reverse(group.memory_bytes), group.members[0].node));
        roomy.sort_by_key(|group| (std::cmp::Reverse(group.memory_bytes), group.layer_ns, group.members[0].node));
        for stages in least..=most.min(u32::try_from(groups.len()).unwrap_or(u32::MAX)) {
            let fit = [&groups, &roomy].into_iter().find_map(|order| self.fit(&order[..stages as usize]));
            found.extend(fit);
        }
        found
    }

    /// Of every node as many groups as fit there, up to `times`; then of those nodes that are too small for one, with links that are good enough.
    fn groups<'a>(&self, parts: u32, times: u32, offers: &'a [Offer]) -> Vec<Group<'a>> {
        let slots = |offer: &Offer| offer.free.slots(&self.ask);
        let mut groups = Vec::new();
        for offer in offers {
            let here = (slots(offer) / parts).min(times);
            let share = offer.free.memory_bytes / u64::from((here * parts).max(1));
            groups.extend((0..here).filter_map(|_| self.group(vec![offer; parts as usize], share)));
        }
        let mut small: Vec<&Offer> = offers.iter().filter(|offer| (1..parts).contains(&slots(offer))).collect();
        small.sort_by_key(|offer| (offer.rtt_us, offer.node));
        let across = small.chunks_exact(parts as usize).filter_map(|members| {
            let least = members.iter().map(|offer| offer.free.memory_bytes).min()?;
            self.group(members.to_vec(), least)
        });
        groups.extend(across);
        groups
    }

    fn group<'a>(&self, members: Vec<&'a Offer>, memory_bytes: u64) -> Option<Group<'a>> {
        let parts = members.len() as u64;
        let slowest = members.iter().map(|offer| offer.layer_ns).max()?;
        let exchange = members.iter().flat_map(|from| members.iter().map(|to| hop_ns(from, to))).max()?;
        let small = 2 * exchange <= slowest / ROUND_TRIP_PART;
        if parts > 1 && self.serve.tensor.is_none() && !small {
            return None;
        }
        let exchanges = if parts > 1 { 2 * exchange } else { 0 };
        let memory_bytes = self.memory_bytes.unwrap_or(memory_bytes);
        Some(Group { members, memory_bytes, layer_ns: slowest.div_ceil(parts) + exchanges })
    }

    /// D3: one stage a group.
    fn fit<'a>(&self, groups: &[Group<'a>]) -> Option<Candidate<'a>> {
        let mut groups = groups.to_vec();
        let stages = groups.len();
        // The last stage has the output layer besides: where there is most room.
        let roomiest = (0..stages).max_by_key(|at| groups[*at].memory_bytes)?;
        let last = groups.remove(roomiest);
        groups.push(last);
        let most = |at: usize| self.layers_max(&groups[at], (at == 0, at + 1 == stages));
        let caps: Vec<u32> = (0..stages).map(most).collect();
        let time = |at: usize, layers: u32| {
            let output = if at + 1 == stages { self.output_ns(&groups[at]) } else { 0 };
            groups[at].layer_ns.saturating_mul(layers.into()).saturating_add(output)
        };
        let layers = match &self.serve.layers {
            Some(written) => written.clone(),
            None => deal(self.model.layers, &caps, time)?,
        };
        if layers.iter().zip(&caps).any(|(own, cap)| own > cap) {
            return None;
        }
        let times = || layers.iter().enumerate().map(|(at, own)| time(at, *own));
        let hops = (0..stages).filter(|_| stages > 1).map(|at| {
            // The last one sends the token to the first.
            hop_ns(groups[at].members[0], groups[(at + 1) % stages].members[0])
        });
        let token_ns = times().chain(hops).fold(0, u64::saturating_add);
        let stage_ns = times().max()?;
        Some(Candidate { layers, token_ns, stage_ns, groups })
    }

    /// How many layers a part of this stage has memory for.
    fn layers_max(&self, group: &Group<'_>, ends: (bool, bool)) -> u32 {
        let parts = group.members.len() as u64;
        let (mut fits, mut over) = (0, self.model.layers + 1);
        while over - fits > 1 {
            let middle = fits + (over - fits) / 2;
            let fit = self.bytes(middle, parts, ends) <= group.memory_bytes;
            match fit && self.request_bytes(middle, parts) <= self.serve.cache.0 {
                true => fits = middle,
                false => over = middle,
            }
        }
        fits
    }

    /// What a rank needs that has a part of so many layers; and whether its stage is the first, and the last.
    fn bytes(&self, layers: u32, parts: u64, (first, last): (bool, bool)) -> u64 {
        let Surveyed { layer_bytes, embedding_bytes, output_bytes, kv_heads, vocabulary, .. } = *self.model;
        let layers = u64::from(layers);
        let weights = layer_bytes.saturating_mul(layers).div_ceil(parts);
        let tied = output_bytes == 0;
        let embedding = if first || last && tied { embedding_bytes } else { 0 };
        let output = if last { output_bytes + ROWS_MAX * u64::from(vocabulary) * 4 } else { 0 };
        let token = u64::from(self.model.token_bytes) * u64::from(kv_heads).div_ceil(parts) * layers;
        let context = u64::from(self.serve.context.unwrap_or(self.model.context));
        let running = |layer: u64| layer.saturating_mul(context).saturating_mul(self.serve.running.into());
        let cache = running(token).min(self.serve.cache.0);
        // What the rank before it has in its cache, of as many layers as that may have.
        let alone = first && last && parts == 1;
        let all =
            u64::from(self.model.token_bytes) * u64::from(kv_heads).div_ceil(parts) * u64::from(self.model.layers);
        let kept = if self.serve.keep && !alone { running(all).min(self.serve.cache.0) } else { 0 };
        [weights, embedding, output, cache, kept].into_iter().fold(PROCESS_BYTES, u64::saturating_add)
    }

    /// Keys and values of the longest request, where the spec says how long it may be; otherwise as long as there is room.
    fn request_bytes(&self, layers: u32, parts: u64) -> u64 {
        let Surveyed { token_bytes, kv_heads, .. } = *self.model;
        let token = u64::from(token_bytes) * u64::from(kv_heads).div_ceil(parts) * u64::from(layers);
        let context = u64::from(self.serve.context.unwrap_or(2)).next_multiple_of(PAGE_MAX);
        token.saturating_mul(context)
    }

    fn output_ns(&self, group: &Group<'_>) -> u64 {
        let Surveyed { layer_bytes, embedding_bytes, output_bytes, .. } = *self.model;
        let bytes = if output_bytes == 0 { embedding_bytes } else { output_bytes };
        // Every part of the last stage computes all of it.
        let whole = group.members.iter().map(|offer| offer.layer_ns).max().unwrap_or(0);
        u64::try_from(u128::from(whole) * u128::from(bytes) / u128::from(layer_bytes.max(1))).unwrap_or(u64::MAX)
    }

    fn told(&self, best: &Candidate<'_>, why: String) -> Split {
        let stages = best.groups.len();
        let mut ranks = Vec::with_capacity(best.ranks());
        let mut from = 0;
        for (stage, (group, own)) in best.groups.iter().zip(&best.layers).enumerate() {
            let parts = group.members.len();
            let needed = self.bytes(*own, parts as u64, (stage == 0, stage + 1 == stages));
            // Whole mebibytes, for people.
            let memory_bytes = self.memory_bytes.unwrap_or(needed.div_ceil(1 << 20) << 20).min(group.memory_bytes);
            for (part, offer) in group.members.iter().enumerate() {
                ranks.push(SplitRank {
                    stage: stage as u32,
                    part: part as u32,
                    layers: (from, from + own),
                    memory_bytes,
                    node: offer.node,
                    layer_ns: offer.layer_ns,
                    rtt_us: offer.rtt_us,
                });
            }
            from += own;
        }
        let tensor = best.groups.first().map_or(1, |group| group.members.len()) as u32;
        let Candidate { token_ns, stage_ns, .. } = *best;
        Split { stages: stages as u32, tensor, ranks: ranks.into(), token_ns, stage_ns, why }
    }

    /// Why nothing fits now.
    fn short(&self, offers: &[Offer]) -> String {
        let alone = self.bytes(self.model.layers, 1, (true, true));
        // One layer with the output is the least that the last of many stages has.
        let least = self.bytes(1, self.serve.tensor.unwrap_or(1).into(), (false, true));
        let room = |offer: &Offer| {
            format!("{} has {} and {} cpus free", offer.node, words(offer.free.memory_bytes), offer.free.cpus)
        };
        let shown: Vec<String> = offers.iter().take(8).map(room).collect();
        let shown = if shown.is_empty() { "no node is there".to_owned() } else { shown.join("; ") };
        let (ranks, without_memory) = (self.serve.ranks(), Room { memory_bytes: 0, ..self.ask });
        let slots = offers.iter().fold(0, |sum: u32, offer| sum.saturating_add(offer.free.slots(&without_memory)));
        if slots < ranks {
            let gpus = if self.ask.gpus > 0 { format!(" and {} gpus", self.ask.gpus) } else { String::new() };
            return format!(
                "its model does not fit: it needs at least {} with {} cpus{gpus} each, and there is room for {slots}; {shown}: \
                 free some, add nodes, or ask for less",
                rank_count(ranks),
                self.ask.cpus
            );
        }
        let mut limit = match self.memory_bytes {
            Some(memory) => format!(", and the spec gives {} to each", words(memory)),
            None => String::new(),
        };
        let request = self.request_bytes(self.model.layers, 1);
        if request > self.serve.cache.0 {
            let (cache, needed) = (self.serve.cache, whole_words(request));
            limit.push_str(&format!(", of a cache of {cache} where one request may need {needed} over all layers"));
        }
        if let Some(stages) = self.serve.said_stages() {
            limit.push_str(&format!(", in {stages} stages"));
        }
        if let Some(parts) = self.serve.tensor {
            limit.push_str(&format!(", in {parts} parts a stage"));
        }
        format!(
            "its model does not fit: a rank by itself needs {} of memory, of many ranks each at least {}{limit}, with {} cpus; {shown}: \
             free some, add nodes, or ask for less",
            whole_words(alone),
            whole_words(least),
            self.ask.cpus
        )
    }
}

/// Layer by layer to the stage that is done first with one more, where there is room. Each stage has one at least.
fn deal(layers: u32, caps: &[u32], time: impl Fn(usize, u32) -> u64) -> Option<Vec<u32>> {
    let stages = u32::try_from(caps.len()).ok()?;
    let room = caps.iter().fold(0u32, |sum, cap| sum.saturating_add(*cap));
    if caps.contains(&0) || stages > layers || room < layers {
        return None;
    }
    let mut dealt = vec![1; caps.len()];
    for _ in stages..layers {
        let open = (0..caps.len()).filter(|at| dealt[*at] < caps[*at]);
        let next = open.min_by_key(|at| time(*at, dealt[*at] + 1))?;
        dealt[next] += 1;
    }
    Some(dealt)
}

/// One way between two ranks: at most over the coordinator, where no shorter way was measured.
fn hop_ns(from: &Offer, to: &Offer) -> u64 {
    let way = if from.node == to.node { 0 } else { (u64::from(from.rtt_us) + u64::from(to.rtt_us)) * 500 };
    HOP_NS + way
}

fn milliseconds(ns: u64) -> String {
    format!("{:.2} ms", ns as f64 / 1e6)
}

/// Of what there is: rounded down.
fn words(bytes: u64) -> Bytes {
    Bytes(bytes >> 20 << 20)
}

/// Of what is needed: rounded up.
fn whole_words(bytes: u64) -> Bytes {
    Bytes(bytes.div_ceil(1 << 20) << 20)
}

impl Job {
    /// It waits for its cut before it waits for room.
    pub fn awaits_cut(&self) -> bool {
        self.state == JobState::Queued && self.cut == Cut::Awaited
    }

    /// No node could mend what is wrong with its cut.
    pub(super) fn refuse_split(&mut self, scene: &mut Scene<'_>, reason: &str) {
        self.end(scene, JobState::Failed, reason.to_owned());
    }

    pub(super) fn check_split(&self) -> Result<(), String> {
        if self.awaits_cut() { Ok(()) } else { Err(format!("{} waits for no cut", self.id)) }
    }

    pub(super) fn take_split(&mut self, scene: &mut Scene<'_>, chosen: &Chosen) {
        let Split { stages, tensor, ranks, why, .. } = &chosen.split;
        let seat = |rank: &SplitRank| Seat { node: rank.node, memory_bytes: rank.memory_bytes };
        self.ask.seats = ranks.iter().map(seat).collect();
        self.ask.ranks = ranks.len() as u32;
        self.ask.room.memory_bytes = ranks.iter().map(|rank| rank.memory_bytes).max().unwrap_or(0);
        self.ranks_min = self.ask.ranks;
        self.cut = Cut::Chosen(Box::new(chosen.clone()));
        let layers = ranks.iter().filter(|rank| rank.part == 0).map(|rank| (rank.layers.1 - rank.layers.0).to_string());
        let layers: Vec<String> = layers.collect();
        let text = format!("cut into {stages} x {tensor} ranks ({why}), layers of each stage: {}", layers.join(", "));
        self.note(scene, text);
        self.changed(scene);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// 30 layers of 10 MiB, 100 MiB of embedding that is the output too; a layer takes a millisecond.
    fn model() -> Surveyed {
        Surveyed {
            layers: 30,
            layer_bytes: 10 * MIB,
            embedding_bytes: 100 * MIB,
            output_bytes: 0,
            kv_heads: 4,
            parts_max: 4,
            token_bytes: 512,
            context: 2048,
            vocabulary: 1024,
            layer_ns: 0,
        }
    }

    fn spec(serve: &str, resources: &str) -> JobSpec {
        let text = format!(
            "name = \"m\"\n[serve]\nmodel = \"m\"\ncache = \"20MiB\"\nkeep = false\n{serve}\n[resources]\n{resources}"
        );
        JobSpec::parse(&text).unwrap()
    }

    fn offer(node: u64, cpus: u32, mebibytes: u64, layer_us: u64, rtt_us: u32) -> Offer {
        let free = Room { cpus, memory_bytes: mebibytes * MIB, gpus: 0 };
        Offer { node: NodeId(node), free, layer_ns: layer_us * 1_000, rtt_us }
    }

    fn cut(split: &Split) -> Vec<(u64, u32)> {
        split.ranks.iter().map(|rank| (rank.node.0, rank.layers.1 - rank.layers.0)).collect()
    }

    #[test]
    fn a_model_that_fits_on_one_node_goes_there_whole_with_the_memory_that_it_needs() {
        let split =
            split(&spec("", ""), &model(), &[offer(1, 1, 4096, 1_000, 100), offer(2, 1, 4096, 500, 100)]).unwrap();
        assert_eq!((split.stages, split.tensor, cut(&split)), (1, 1, vec![(2, 30)]), "the faster one");
        assert_eq!(split.ranks[0].memory_bytes, (128 + 300 + 100 + 20) * MIB + MIB / 4 + 3 * MIB / 4);
        assert_eq!((split.token_ns, split.stage_ns), (20_000_000, 20_000_000), "the output is worth ten layers");
        assert_eq!(split.why, "the whole model fits on one rank");
    }

    #[test]
    fn equal_nodes_that_are_too_small_share_the_layers_and_the_output_counts() {
        let split =
            split(&spec("", ""), &model(), &[offer(1, 1, 450, 1_000, 100), offer(2, 1, 450, 1_000, 100)]).unwrap();
        assert_eq!((split.stages, split.tensor), (2, 1));
        assert_eq!(cut(&split), [(1, 20), (2, 10)]);
        assert_eq!(split.stage_ns, 20_000_000);
        assert_eq!(split.token_ns, 40_000_000 + 2 * 200_000);
        assert_eq!(split.why, "it does not fit on fewer ranks");
    }

    #[test]
    fn a_node_with_half_the_memory_gets_what_it_has_room_for() {
        let split =
            split(&spec("", ""), &model(), &[offer(1, 1, 500, 1_000, 100), offer(2, 1, 300, 1_000, 100)]).unwrap();
        let given: u32 = cut(&split).iter().map(|(_, layers)| layers).sum();
        assert_eq!((split.stages, given), (2, 30));
        for rank in split.ranks.iter() {
            let has = if rank.node == NodeId(1) { 500 } else { 300 };
            assert!(rank.memory_bytes <= has * MIB, "{rank:?}");
        }
        // 128 for the process, 100 for the embedding, 20 for the cache: room for 5 layers.
        assert_eq!(cut(&split), [(2, 5), (1, 25)]);
    }

    #[test]
    fn a_node_that_is_twice_as_fast_gets_twice_the_layers() {
        let untied = Surveyed { output_bytes: 1, ..model() };
        let nodes = [offer(1, 1, 420, 1_000, 100), offer(2, 1, 460, 500, 100)];
        let split = split(&spec("", ""), &untied, &nodes).unwrap();
        assert_eq!(cut(&split), [(1, 10), (2, 20)]);
    }

    #[test]
    fn parts_are_chosen_where_they_are_clearly_faster_and_a_slow_link_forbids_them() {
        let slow = 20_000;
        let together = split(&spec("", ""), &model(), &[offer(1, 2, 4096, slow, 100)]).unwrap();
        assert_eq!((together.stages, together.tensor), (1, 2), "{}", together.why);
        assert!(together.why.contains("instead of"), "{}", together.why);
        let near =
            split(&spec("", ""), &model(), &[offer(1, 1, 4096, slow, 100), offer(2, 1, 4096, slow, 100)]).unwrap();
        assert_eq!((near.tensor, cut(&near)), (2, vec![(1, 30), (2, 30)]));
        let far = [offer(1, 1, 4096, slow, 5_000), offer(2, 1, 4096, slow, 5_000)];
        assert_eq!(split(&spec("", ""), &model(), &far).unwrap().tensor, 1);
        assert_eq!(split(&spec("tensor = 2", ""), &model(), &far).unwrap().tensor, 2, "a spec is obeyed");
        let quick = split(&spec("", ""), &model(), &[offer(1, 4, 4096, 300, 100)]).unwrap();
        assert_eq!(quick.tensor, 1, "exchanges would take longer than they save");
    }

    #[test]
    fn ranks_that_keep_the_cache_of_another_need_as_much_again_but_one_by_itself() {
        let keeps = |nodes: &[Offer]| {
            let mut spec = spec("", "");
            spec.serve.as_mut().unwrap().keep = true;
            let split = split(&spec, &model(), nodes).unwrap();
            split.ranks.iter().map(|rank| rank.memory_bytes / MIB).collect::<Vec<_>>()
        };
        assert_eq!(keeps(&[offer(1, 1, 4096, 1_000, 100)]), [549]);
        assert_eq!(
            keeps(&[offer(1, 1, 500, 1_000, 100), offer(2, 1, 500, 1_000, 100)]),
            [248 + 200 + 20, 249 + 100 + 20]
        );
    }

    #[test]
    fn what_the_spec_says_is_kept() {
        let nodes = [offer(1, 4, 4096, 1_000, 100), offer(2, 4, 4096, 1_000, 100)];
        let three = split(&spec("stages = 3", ""), &model(), &nodes).unwrap();
        assert_eq!((three.stages, three.tensor, three.why.as_str()), (3, 1, "as the spec says"));
        let written = split(&spec("layers = [25, 5]\ntensor = 1", ""), &model(), &nodes).unwrap();
        assert_eq!(written.ranks.iter().map(|rank| rank.layers).collect::<Vec<_>>(), [(0, 25), (25, 30)]);
        assert_eq!(written.why, "as the spec says");
        let memory = split(&spec("", "memory = \"350MiB\""), &model(), &nodes).unwrap();
        assert!(memory.ranks.iter().all(|rank| rank.memory_bytes == 350 * MIB), "{memory:?}");
        assert_eq!(memory.stages, 3, "two of them on one node");
        let parts = split(&spec("tensor = 5", ""), &model(), &nodes).unwrap_err();
        assert!(matches!(&parts, Unfit::Wrong(words) if words.starts_with("tensor = 5")), "{parts:?}");
        let many = split(&spec("stages = 31", ""), &model(), &nodes).unwrap_err();
        assert!(matches!(&many, Unfit::Wrong(words) if words.contains("use at most 30")), "{many:?}");
    }

    #[test]
    fn what_is_short_is_said() {
        let short = |spec: &JobSpec, offers: &[Offer]| match split(spec, &model(), offers) {
            Err(Unfit::Short(words)) => words,
            other => panic!("{other:?}"),
        };
        let nothing = short(&spec("", ""), &[offer(1, 1, 200, 1_000, 100), offer(2, 1, 150, 1_000, 100)]);
        assert!(nothing.contains("needs 549MiB") && nothing.contains("node-1 has 200MiB"), "{nothing}");
        let cpus = short(&spec("stages = 3\ntensor = 2", "cpus = 2"), &[offer(1, 7, 4096, 1_000, 100)]);
        assert!(cpus.contains("at least 6 ranks with 2 cpus each, and there is room for 3"), "{cpus}");
    }

    #[test]
    fn what_no_node_could_mend_is_said_at_once() {
        let wrong = |spec: &JobSpec| match split(spec, &model(), &[]) {
            Err(Unfit::Wrong(words)) => words,
            other => panic!("{other:?}"),
        };
        let memory = wrong(&spec("stages = 1\ntensor = 1", "memory = \"400MiB\""));
        assert!(
            memory.starts_with("memory = \"400MiB\": a rank with 30 layers of this model needs 549MiB"),
            "{memory}"
        );
        let little = wrong(&spec("", "memory = \"200MiB\""));
        assert!(little.starts_with("memory = \"200MiB\": a rank with 1 layer"), "{little}");
        let cache = wrong(&spec("context = 2048\nstages = 1\ntensor = 1", ""));
        assert!(
            cache.starts_with("cache = \"20MiB\"") && cache.contains("need 120MiB in a rank with 30 layers"),
            "{cache}"
        );
        assert!(matches!(split(&spec("", ""), &model(), &[]), Err(Unfit::Short(_))));
    }
}
