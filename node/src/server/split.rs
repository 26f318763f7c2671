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
}

impl Spot {
    pub fn of(rank: u32, serve: &Serve) -> Self {
        let Serve { stages, tensor, .. } = *serve;
        Self { stage: rank / tensor, part: rank % tensor, stages, tensor }
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

/// The layers of each stage, so that the one with most work has as little as can be. Work is in weights that a token is multiplied with; the last
/// stage has the output's besides.
pub fn layers(config: &DecoderConfig, stages: u32) -> Result<Vec<Range<usize>>, String> {
    let (count, stages) = (config.layers, stages as usize);
    if stages > count {
        return Err(format!("stages = {stages}: the model has {count} layers, use at most {count}"));
    }
    let DecoderConfig { hidden, heads, kv_heads, head_size, ffn, vocab, .. } = *config;
    let layer = hidden * head_size * 2 * (heads + kv_heads) + 3 * hidden * ffn;
    let output = hidden * vocab;
    // The last stage has so many layers that its output makes up for what the others have more; at least one.
    let largest = |last: usize| {
        let others = (count - last).div_ceil((stages - 1).max(1));
        (others * layer).max(last * layer + output)
    };
    let last = match stages {
        1 => count,
        _ => (1..=count + 1 - stages).min_by_key(|last| largest(*last)).expect("each stage has a layer"),
    };
    let (left, others) = (count - last, stages - 1);
    let start = |stage: usize| if stage == others { left } else { left * stage / others };
    let end = |stage: usize| if stage == others { count } else { start(stage + 1) };
    Ok((0..stages).map(|stage| start(stage)..end(stage)).collect())
}

/// Pages of the cache, the same number on every rank: as many as fit into `cache` where they are largest, and not more than all requests that run
/// could use.
pub fn pages(config: &DecoderConfig, serve: &Serve, context: usize) -> Result<u32, String> {
    let stages = layers(config, serve.stages)?;
    let most = stages.iter().map(Range::len).max().unwrap_or(1);
    let heads = config.kv_heads.div_ceil(serve.tensor as usize);
    let page = Cache::page_bytes(most, (heads, config.head_size)) as u64;
    let request = context.div_ceil(Cache::PAGE) as u64;
    let pages = (serve.cache.0 / page).min(request * u64::from(serve.running));
    if pages < request {
        return Err(format!(
            "cache = \"{}\" has room for {} tokens, and a request may have {context}: use at least {} bytes, or a smaller context",
            serve.cache,
            pages as usize * Cache::PAGE,
            request * page
        ));
    }
    u32::try_from(pages).map_err(|_| format!("cache = \"{}\": more than 2^32 pages", serve.cache))
}

#[cfg(test)]
mod tests {
    use stoke_protocol::spec::JobSpec;

    use super::*;

    fn config() -> DecoderConfig {
        DecoderConfig {
            architecture: "llama".into(),
            layers: 30,
            hidden: 576,
            heads: 9,
            kv_heads: 3,
            head_size: 64,
            ffn: 1536,
            vocab: 49_152,
            context: 2048,
            rms_epsilon: 1e-5,
            rope_base: 10_000.0,
            rope: stoke_jobs::lm::Rope::Halves,
            tied_embeddings: true,
            qkv_bias: false,
        }
    }

    #[test]
    fn stages_have_all_layers_once_and_the_last_has_fewer_for_its_output() {
        for stages in 1..=30 {
            let layers = layers(&config(), stages).unwrap();
            assert_eq!((layers[0].start, layers[layers.len() - 1].end, layers.len()), (0, 30, stages as usize));
            assert!(layers.windows(2).all(|pair| pair[0].end == pair[1].start), "{layers:?}");
            assert!(layers.iter().all(|stage| !stage.is_empty()), "{layers:?}");
        }
        assert_eq!(layers(&config(), 2).unwrap(), [0..19, 19..30]);
        assert!(layers(&config(), 31).unwrap_err().contains("use at most 30"));
    }

    #[test]
    fn every_rank_meets_those_that_it_speaks_with_and_both_sides_agree() {
        let serve = |stages, tensor| -> Serve {
            let text = format!("name = \"m\"\n[serve]\nmodel = \"m\"\nstages = {stages}\ntensor = {tensor}");
            JobSpec::parse(&text).unwrap().serve.unwrap()
        };
        for (stages, tensor) in [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 3)] {
            let serve = serve(stages, tensor);
            for rank in 0..stages * tensor {
                for peer in Spot::of(rank, &serve).peers() {
                    assert!(Spot::of(peer, &serve).peers().contains(&rank), "{rank} {peer} of {stages} x {tensor}");
                }
            }
        }
        assert_eq!(Spot::of(0, &serve(3, 1)).peers(), [1, 2]);
        assert_eq!(Spot::of(3, &serve(2, 2)).peers(), [1, 2]);
    }
}
