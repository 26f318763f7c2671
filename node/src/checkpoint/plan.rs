//! Which rank writes which tensor, and under which name. Pure: every rank computes the same plan by itself.

use stoke_jobs::NamedTensor;
use stoke_protocol::ids::{Generation, Step};

/// `step-00000120-g1`: sorts by step, and no two generations share a folder (I2).
pub fn folder_name(step: Step, generation: Generation) -> String {
    format!("step-{:08}-{generation}", step.0)
}

/// The inverse; nothing for any other name.
pub(super) fn parse_folder_name(name: &str) -> Option<(Step, Generation)> {
    let (step, generation) = name.strip_prefix("step-")?.split_once('-')?;
    let parsed = (step.parse().map(Step).ok()?, generation.parse().ok()?);
    (folder_name(parsed.0, parsed.1) == name).then_some(parsed)
}

/// `shard-0-of-3.safetensors`.
pub fn shard_file(index: u32, world: u32) -> String {
    format!("shard-{index}-of-{world}.safetensors")
}

/// The tensors of each of `world` shards, as positions in `tensors`, ascending: whole tensors, the largest first, each to the shard that is
/// the smallest so far. Shards may be empty when there are more ranks than tensors.
pub fn plan_shards(tensors: &[NamedTensor], world: u32) -> Vec<Vec<usize>> {
    let mut largest_first: Vec<usize> = (0..tensors.len()).collect();
    // Stable: equal sizes stay in order, so that the plan is a function of the list alone.
    largest_first.sort_by_key(|&index| std::cmp::Reverse(tensors[index].values.len()));
    let mut shards = vec![(0usize, Vec::new()); world as usize];
    for index in largest_first {
        let smallest = shards.iter_mut().min_by_key(|(elements, _)| *elements).expect("a job has at least one rank");
        smallest.0 += tensors[index].values.len();
        smallest.1.push(index);
    }
    shards
        .into_iter()
        .map(|(_, mut indices)| {
            indices.sort_unstable();
            indices
        })
        .collect()
}

/// The tensors of shard `index`.
pub fn own_shard(tensors: Vec<NamedTensor>, index: u32, world: u32) -> Vec<NamedTensor> {
    let own = plan_shards(&tensors, world).swap_remove(index as usize);
    let owned = |(position, tensor)| own.binary_search(&position).is_ok().then_some(tensor);
    tensors.into_iter().enumerate().filter_map(owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, len: usize) -> NamedTensor {
        NamedTensor { name: name.into(), shape: vec![len], values: vec![0.0; len] }
    }

    #[test]
    fn every_tensor_is_in_one_shard_and_shards_are_even() {
        let tensors: Vec<NamedTensor> = (0..20).map(|i| tensor(&format!("t{i}"), 100 + i * 7)).collect();
        for world in 1..6 {
            let plan = plan_shards(&tensors, world);
            let mut all: Vec<usize> = plan.iter().flatten().copied().collect();
            all.sort_unstable();
            assert_eq!(all, (0..20).collect::<Vec<_>>());
            let size = |shard: &Vec<usize>| shard.iter().map(|&i| tensors[i].values.len()).sum::<usize>();
            let (least, most) = (plan.iter().map(size).min().unwrap(), plan.iter().map(size).max().unwrap());
            assert!(most - least <= 240, "{least} to {most} in {world} shards");
        }
    }

    #[test]
    fn more_ranks_than_tensors_leave_shards_empty() {
        assert_eq!(plan_shards(&[tensor("a", 4)], 3), [vec![0], vec![], vec![]]);
    }

    #[test]
    fn names_sort_by_step() {
        assert_eq!(folder_name(Step(120), Generation(1)), "step-00000120-g1");
        assert!(folder_name(Step(99), Generation(9)) < folder_name(Step(100), Generation(1)));
    }
}
