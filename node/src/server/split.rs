//! How a model is cut over the ranks of a gang: which layers a stage has, and how many pages of the cache every rank has. A function of the model
//! and the spec alone, so that every rank comes to the same result. Moves nothing.

use std::ops::Range;

use stoke_jobs::lm::DecoderConfig;
use stoke_jobs::lm::kernels::Cache;
use stoke_protocol::spec::Serve;

/// A rank's place in its gang.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spot {
    pub stage: u32,
    pub part: u32,
    pub stages: u32,
    pub tensor: u32,
    /// Whether it keeps pages of the rank before it, and the next one its own.
    pub keeps: bool,
}

impl Spot {
    pub fn of(rank: u32, serve: &Serve) -> Self {
        let (stages, tensor) = (serve.stages(), serve.tensor());
        let keeps = serve.keep && serve.ranks() > 1;
        Self { stage: rank / tensor, part: rank % tensor, stages, tensor, keeps }
    }

    pub fn ranks(self) -> u32 {
        self.stages * self.tensor
    }

    /// The rank that keeps this one's pages: a ring.
    pub fn next(self) -> u32 {
        (self.rank() + 1) % self.ranks()
    }

    /// The rank whose pages this one keeps.
    pub fn before(self) -> u32 {
        (self.rank() + self.ranks() - 1) % self.ranks()
    }

    pub fn rank(self) -> u32 {
        self.stage * self.tensor + self.part
    }

    pub fn is_head(self) -> bool {
        self.rank() == 0
    }

    pub fn is_last_stage(self) -> bool {
        self.stage + 1 == self.stages
    }
}

/// The layers of each stage: those that the spec says or the coordinator has chosen, else as equal in work as they can be.
pub fn layers(config: &DecoderConfig, serve: &Serve) -> Result<Vec<Range<usize>>, String> {
    let (layers, stages) = (config.layers, serve.stages());
    if let Some(written) = &serve.layers {
        let sum: usize = written.iter().map(|own| *own as usize).sum();
        if sum != layers {
            return Err(format!("layers = {written:?} are {sum} together: the model has {layers}"));
        }
        let mut from = 0;
        let cut = |own: &u32| {
            let range = from..from + *own as usize;
            from = range.end;
            range
        };
        return Ok(written.iter().map(cut).collect());
    }
    config
        .stages(stages as usize)
        .ok_or_else(|| format!("stages = {stages}: the model has {layers} layers, use at most {layers}"))
}

/// Tokens that the cache of every rank has room for.
pub fn room(config: &DecoderConfig, serve: &Serve) -> Result<usize, String> {
    Ok((serve.cache.0 / page_bytes(config, serve)?) as usize * Cache::PAGE)
}

/// Pages of the cache, the same number on every rank: as many as fit into `cache` where they are largest, and not more than all requests that run
/// could use.
pub fn pages(config: &DecoderConfig, serve: &Serve, context: usize) -> Result<u32, String> {
    let page = page_bytes(config, serve)?;
    let request = context.div_ceil(Cache::PAGE) as u64;
    let pages = (serve.cache.0 / page).min(request * u64::from(serve.running));
    if pages < request {
        let (room, needed) = (room(config, serve)?, (request * page).div_ceil(1 << 20));
        return Err(format!(
            "cache = \"{}\" has room for {room} tokens, and a request may have {context}: use at least \"{needed}MiB\", or context = {room}",
            serve.cache
        ));
    }
    u32::try_from(pages).map_err(|_| format!("cache = \"{}\": more than 2^32 pages", serve.cache))
}

/// Of the rank that has most layers and heads.
fn page_bytes(config: &DecoderConfig, serve: &Serve) -> Result<u64, String> {
    let stages = layers(config, serve)?;
    let most = stages.iter().map(Range::len).max().unwrap_or(1);
    let heads = config.kv_heads.div_ceil(serve.tensor() as usize);
    Ok(Cache::page_bytes(most, (heads, config.head_size)) as u64)
}

#[cfg(test)]
mod tests {
    use stoke_protocol::spec::JobSpec;

    use super::*;

    #[test]
    fn every_rank_meets_those_that_it_speaks_with_and_both_sides_agree() {
        let serve = |stages, tensor, keep| -> Serve {
            let text =
                format!("name = \"m\"\n[serve]\nmodel = \"m\"\nstages = {stages}\ntensor = {tensor}\nkeep = {keep}");
            JobSpec::parse(&text).unwrap().serve.unwrap()
        };
        for (stages, tensor) in [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 3)] {
            for serve in [true, false].map(|keep| serve(stages, tensor, keep)) {
                for rank in 0..stages * tensor {
                    for peer in Spot::of(rank, &serve).peers() {
                        assert!(Spot::of(peer, &serve).peers().contains(&rank), "{rank} {peer} of {stages} x {tensor}");
                    }
                }
            }
        }
        assert_eq!(Spot::of(0, &serve(3, 1, false)).peers(), [1, 2]);
        assert_eq!(Spot::of(3, &serve(2, 2, false)).peers(), [1, 2]);
        assert_eq!(Spot::of(3, &serve(2, 2, true)).peers(), [0, 1, 2]);
        assert_eq!(Spot::of(1, &serve(4, 1, false)).peers(), [0, 2]);
        assert_eq!(Spot::of(0, &serve(4, 1, true)).peers(), [1, 2, 3]);
    }
}
