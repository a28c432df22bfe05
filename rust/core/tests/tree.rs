//! Keys that wait: discounts when they are read against discounts at every update, and states that are taken back.

use std::collections::BTreeMap;

use ebpo_core::{
    Batch, Columns, DecayBy, Error, GroupStats, Keys, Layout, Options, Path, Prior, Score, Shrinkage, State,
};
use proptest::prelude::*;

const SIZE: usize = 2;

fn stats(rewards: &[f64]) -> GroupStats {
    GroupStats::collect(&Batch::new(rewards, Layout::Equal { size: SIZE }, None).unwrap()).unwrap()
}

fn paths() -> Vec<Path> {
    let path = |parts: &[&str]| parts.iter().map(ToString::to_string).collect();
    vec![path(&[]), path(&["a"]), path(&["a", "1"]), path(&["a", "2"]), path(&["b", "x", "y"]), path(&["a", "1"])]
}

/// Rewards of a batch's groups, each group's key, and whether the batch updates.
type Step = (Vec<f64>, Vec<u32>, bool);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (1_usize..5).prop_flat_map(|groups| {
        let value = prop_oneof![4 => -2.0_f64..2.0, 1 => Just(f64::NAN)];
        (
            proptest::collection::vec(value, groups * SIZE),
            proptest::collection::vec(0_u32..6, groups),
            prop::bool::weighted(0.8),
        )
    });
    proptest::collection::vec(step, 1..12)
}

fn options() -> impl Strategy<Value = Options> {
    (prop_oneof![Just(1.0), 0.3_f64..1.0], any::<bool>(), any::<bool>()).prop_map(|(decay, visit, before)| Options {
        decay,
        decay_by: if visit { DecayBy::Visit } else { DecayBy::Update },
        score: if before { Score::Before } else { Score::After },
        ..Options::default()
    })
}

fn advance(state: &mut State, options: &Options, (rewards, of_group, update): &Step) {
    let paths = paths();
    let all = stats(rewards);
    state.advance(options, &all, &Keys::new(&paths, of_group, all.len()).unwrap(), *update, None).unwrap();
}

fn advance_all(state: &mut State, options: &Options, steps: &[Step]) {
    for step in steps {
        advance(state, options, step);
    }
}

/// The priors by the definition: every key is looked at in every update.
fn eagerly(options: &Options, steps: &[Step]) -> BTreeMap<Path, Prior> {
    let paths = paths();
    let mut priors = BTreeMap::from([(Path::new(), Prior::default())]);
    for (rewards, of_group, _) in steps.iter().filter(|(_, _, update)| *update) {
        let mut under: BTreeMap<Path, Vec<f64>> = BTreeMap::new();
        for (rows, &key) in rewards.chunks(SIZE).zip(of_group).filter(|(rows, _)| rows.iter().any(|r| !r.is_nan())) {
            let path = &paths[key as usize];
            for depth in 0..=path.len() {
                under.entry(path[..depth].to_vec()).or_default().extend(rows);
            }
        }
        for (path, prior) in &mut priors {
            if !under.is_empty() && (options.decay_by == DecayBy::Update || under.contains_key(path)) {
                prior.decay(options.decay);
            }
        }
        for (path, rows) in under {
            priors.entry(path).or_default().merge(&Prior::of(&stats(&rows)));
        }
    }
    priors
}

fn close(a: &Prior, b: &Prior) -> bool {
    a.parts().iter().zip(b.parts()).all(|(a, b)| (a - b).abs() <= 1e-10 * a.abs().max(b.abs()).max(1.0))
}

fn resumed(state: &State) -> State {
    let tree = state.tree();
    let (rho, clock) = tree.clock();
    State::new(Columns::of(tree).into_tree(tree.root, rho, clock).unwrap(), state.step())
}

proptest! {
    #[test]
    fn an_idle_key_is_what_the_definition_says(options in options(), steps in steps()) {
        let mut state = State::default();
        advance_all(&mut state, &options, &steps);
        let expected = eagerly(&options, &steps);
        prop_assert_eq!(state.tree().len() + 1, expected.len());
        for (path, prior) in &expected {
            let got = state.tree().get(path).unwrap();
            prop_assert!(close(&got, prior), "{:?} {:?} {:?}", path, got, prior);
        }
        let paths = paths();
        for path in &paths {
            let blended = state.tree().shrunken(path, &options);
            let root = Shrinkage::new(&state.tree().root, &options);
            prop_assert!(blended.mu.is_finite() && (!path.is_empty() || blended == root));
        }
    }

    #[test]
    fn a_state_goes_on_from_its_columns_and_can_be_taken_back(options in options(), steps in steps()) {
        let (mut whole, mut from_columns) = (State::default(), State::default());
        for step in &steps {
            from_columns = resumed(&from_columns);
            let before = whole.clone();
            advance(&mut whole, &options, step);
            advance(&mut from_columns, &options, step);
            prop_assert_eq!(&whole, &from_columns);
            prop_assert_eq!(whole.digest(), from_columns.digest());
            prop_assert_eq!(Columns::of(whole.tree()), Columns::of(from_columns.tree()));
            if step.2 {
                let mut again = whole.before_update();
                prop_assert_eq!(&again, &before);
                prop_assert_eq!(again.digest(), resumed(&before).digest());
                advance(&mut again, &options, step);
                prop_assert_eq!(&again, &whole);
                prop_assert_eq!(again.digest(), whole.digest());
            }
        }
    }

    #[test]
    fn merging_adds_what_is_remembered(options in options(), left in steps(), right in steps()) {
        let (mut a, mut b) = (State::default(), State::default());
        advance_all(&mut a, &options, &left);
        advance_all(&mut b, &options, &right);
        let mut both = a.clone();
        both.merge(&b, usize::MAX).unwrap();
        let mut empty = State::default();
        empty.merge(&a, usize::MAX).unwrap();
        prop_assert_eq!(&empty, &a);
        for path in &paths() {
            let sides = [a.tree().get(path), b.tree().get(path)];
            let mut expected = Prior::default();
            sides.iter().flatten().for_each(|prior| expected.merge(prior));
            match both.tree().get(path) {
                Some(prior) => prop_assert!(close(&prior, &expected), "{:?}", path),
                None => prop_assert!(sides.iter().all(Option::is_none)),
            }
        }
    }

    #[test]
    fn the_rate_may_change_in_between(first in options(), second in options(), left in steps(), right in steps()) {
        let second = Options { decay_by: first.decay_by, ..second };
        let mut state = State::default();
        advance_all(&mut state, &first, &left);
        let start: Vec<_> = paths().iter().map(|path| state.tree().get(path)).collect();
        advance_all(&mut state, &second, &right);
        // Linear in what was there: the old share of a key's count is its count then, times the discounts since.
        let alone = eagerly(&second, &right);
        let updates = right.iter().filter(|(rewards, _, update)| *update && rewards.iter().any(|r| !r.is_nan())).count();
        if second.decay_by == DecayBy::Update {
            for (path, then) in paths().iter().zip(start) {
                let old = then.map_or(0.0, |prior| prior.rewards().count()) * second.decay.powf(updates as f64);
                let new = alone.get(path).map_or(0.0, |prior| prior.rewards().count());
                let now = state.tree().get(path).map_or(0.0, |prior| prior.rewards().count());
                prop_assert!((now - old - new).abs() < 1e-10, "{:?} {} {} {}", path, now, old, new);
            }
        }
    }
}

#[test]
fn an_update_writes_to_no_other_key() {
    let options = Options { decay: 0.5, ..Options::default() };
    let mut state = State::default();
    advance(&mut state, &options, &(vec![1.0, 0.0, 0.0, 0.0], vec![2, 4], true));
    let first = Columns::of(state.tree());
    for _ in 0..3 {
        advance(&mut state, &options, &(vec![1.0, 1.0], vec![3], true));
    }
    let last = Columns::of(state.tree());
    for (index, part) in first.parts().enumerate().filter(|(_, part)| *part != "a") {
        assert_eq!(first.statistics[9 * index..9 * index + 9], last.statistics[9 * index..9 * index + 9], "{part}");
        assert_eq!((first.idle[index], last.idle[index]), (0, 3));
    }
}

#[test]
fn columns_that_no_updates_make_are_refused() {
    let mut state = State::default();
    advance(&mut state, &Options { decay: 0.5, ..Options::default() }, &(vec![1.0, 0.0], vec![2], true));
    let good = Columns::of(state.tree());
    let root = state.tree().root;
    assert!(good.into_tree(root, 0.5, 1).is_ok());
    for rho in [0.0, -1.0, 1.5, f64::NAN] {
        assert!(matches!(good.into_tree(root, rho, 1), Err(Error::InvalidState { field: "idle_decay", .. })));
    }
    let changed = |change: fn(&mut Columns)| {
        let mut columns = good.clone();
        change(&mut columns);
        columns.into_tree(root, 0.5, 1)
    };
    assert!(changed(|c| c.idle[0] = -1).is_err());
    assert!(changed(|c| c.parents[0] = -2).is_err());
    assert!(changed(|c| c.parents.truncate(1)).is_err());
    assert!(changed(|c| c.statistics.truncate(1)).is_err());
    assert!(changed(|c| c.idle.truncate(1)).is_err());
    assert!(changed(|c| c.names.push('ö')).is_err());
    assert!(changed(|c| c.lengths[0] += 1).is_err());
}
