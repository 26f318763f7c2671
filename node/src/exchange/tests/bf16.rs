//! The same with gradients that are rounded between hosts (X17).

use super::*;

const SHAPE: Shape = Shape { values: 70_001, tail: 1, lanes: 8, rounded: true, early: false };
const STEPS: u64 = 6;

fn on(machines: &[Option<u8>], tcp: UseTcp) -> Vec<(Vec<Vec<u32>>, u64)> {
    let cluster = Cluster { machines: machines.to_vec(), tcp, ..Cluster::new() };
    train(cluster.gang(machines.len() as u32, SHAPE), SHAPE, STEPS, true)
}

fn float(bits: &u32) -> f64 {
    f64::from(f32::from_bits(*bits))
}

#[test]
fn all_ranks_have_the_same_bits_which_follow_the_exact_sums() {
    for machines in [&[None, None][..], &[None; 5], &[Some(1), Some(1), Some(2), Some(2)], &[Some(1), None, Some(1)]] {
        let ranks = on(machines, UseTcp::Never);
        let first = ranks[0].0.clone();
        assert!(ranks.iter().all(|(sums, _)| *sums == first), "{machines:?}");
        // By another way, and once more.
        assert!(on(machines, UseTcp::Always).iter().all(|(sums, _)| *sums == first), "{machines:?}");
        for value in 0..SHAPE.values {
            let (mut sum, mut exact, mut largest) = (0.0, 0.0, 0f64);
            for step in 0..STEPS {
                let all =
                    (0..SHAPE.lanes).map(|lane| f64::from(GRADIENTS[(step * 8) as usize + lane as usize][value]).abs());
                largest = largest.max(all.sum());
                exact += float(&EXPECTED[step as usize][value]);
                sum += float(&first[step as usize][value]);
            }
            // Of each that rounds no more is left over than half a place of what it had last: a host's part, and the sum.
            let most = if value < SHAPE.values - SHAPE.tail { largest / 64.0 } else { 0.0 };
            assert!((sum - exact).abs() <= most, "{machines:?}, value {value}: {sum}, exactly {exact}");
        }
    }
}

static EXPECTED: std::sync::LazyLock<Vec<Vec<u32>>> =
    std::sync::LazyLock::new(|| (0..STEPS).map(|step| expected(SHAPE, step)).collect());

static GRADIENTS: std::sync::LazyLock<Vec<Vec<f32>>> = std::sync::LazyLock::new(|| {
    (0..STEPS).flat_map(|step| (0..SHAPE.lanes).map(move |lane| gradient(9, step, lane, SHAPE.values))).collect()
});

#[test]
fn bytes_are_half_between_hosts_and_nothing_is_rounded_within_one() {
    let whole = (SHAPE.values * 4) as u64 * STEPS;
    let sent = |ranks: &[(Vec<Vec<u32>>, u64)]| ranks.iter().map(|(_, sent)| sent).sum::<u64>();
    // Two halves of the partial sums, and two of the sum.
    let rounded = sent(&on(&[None, None], UseTcp::Never));
    assert!((whole..whole + 100 * STEPS).contains(&rounded), "{rounded} of {}", 2 * whole);
    let within = on(&[Some(1); 3], UseTcp::Never);
    assert!(within.iter().all(|(sums, _)| *sums == *EXPECTED));
}

#[test]
fn who_joins_sees_the_sums_of_the_members() {
    let cluster = Cluster::new();
    let (members, joining) = ([cluster.mesh(1, 0), cluster.mesh(1, 1)], [cluster.mesh(2, 2)]);
    let states = [at(0, None), at(0, None), State::default()];
    let mut formed: Vec<Formed> = form(2, &members, &joining, &states, SHAPE).into_iter().map(Result::unwrap).collect();
    let mut observer = formed.pop().unwrap().exchange;
    let gang = members.into_iter().zip(formed.into_iter().map(|formed| formed.exchange)).collect();
    let seen = thread::spawn(move || {
        let bits = |sum: &[f32]| sum.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        (0..STEPS).map(|step| bits(observer.observe(Step(step), false).unwrap())).collect::<Vec<_>>()
    });
    let ranks = train(gang, SHAPE, STEPS, false);
    let seen = seen.join().unwrap();
    assert!(ranks.iter().all(|(sums, _)| *sums == seen));
}
