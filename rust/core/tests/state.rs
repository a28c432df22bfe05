//! Priors by key and one group at a time, against plain formulas.

use ebpo_core::{
    Batch, Columns, Error, GroupStats, Keys, Layout, LeaveOneOut, Normalize, Options, Path, Prior, Score, Shrinkage,
    State, apply,
};
use proptest::prelude::*;

const SIZE: usize = 3;

fn stats(rewards: &[f64]) -> GroupStats {
    GroupStats::collect(&Batch::new(rewards, Layout::Equal { size: SIZE }, None).unwrap()).unwrap()
}

fn path(parts: &[&str]) -> Path {
    parts.iter().map(ToString::to_string).collect()
}

fn paths() -> Vec<Path> {
    vec![path(&[]), path(&["a"]), path(&["a", "1"]), path(&["a", "2"]), path(&["b", "x", "y"])]
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-11 * a.abs().max(b.abs()).max(1.0)
}

fn same_prior(a: &Prior, b: &Prior) -> bool {
    let numbers = |p: &Prior| {
        let (r, m) = (*p.rewards(), *p.means());
        [r.count(), r.mean(), r.m2(), m.count(), m.mean(), m.m2(), p.ssw(), p.dof(), p.inv_n()]
    };
    numbers(a).iter().zip(numbers(b)).all(|(a, b)| close(*a, b))
}

/// Rewards of up to eight groups, and the index of each group's path.
fn keyed() -> impl Strategy<Value = (Vec<f64>, Vec<u32>)> {
    (1_usize..9).prop_flat_map(|groups| {
        let rewards = proptest::collection::vec(-5.0_f64..5.0, groups * SIZE);
        (rewards, proptest::collection::vec(0_u32..5, groups))
    })
}

fn options() -> impl Strategy<Value = Options> {
    (0.1_f64..=1.0, 0.0_f64..20.0, any::<bool>()).prop_map(|(decay, kappa, before)| Options {
        decay,
        kappa,
        score: if before { Score::Before } else { Score::After },
        ..Options::default()
    })
}

proptest! {
    #[test]
    fn a_key_holds_the_groups_under_it((rewards, of_group) in keyed()) {
        let (all, paths) = (stats(&rewards), paths());
        let mut state = State::default();
        state.advance(&Options::default(), &all, &Keys::new(&paths, &of_group, all.len()).unwrap(), true, None).unwrap();
        prop_assert_eq!(state.tree().root, Prior::of(&all));
        for prefix in [path(&["a"]), path(&["a", "2"]), path(&["b"]), path(&["b", "x"])] {
            let under: Vec<f64> = rewards
                .chunks(SIZE)
                .zip(&of_group)
                .filter(|(_, key)| paths[**key as usize].starts_with(&prefix))
                .flat_map(|(rows, _)| rows.to_vec())
                .collect();
            match state.tree().get(&prefix) {
                Some(prior) => prop_assert!(same_prior(&prior, &Prior::of(&stats(&under)))),
                None => prop_assert!(under.is_empty()),
            }
        }
    }

    #[test]
    fn keys_at_the_root_change_nothing((rewards, _) in keyed(), options in options(), leave_one_out: bool) {
        let options = Options { leave_one_out: if leave_one_out && options.score == Score::After { LeaveOneOut::Group } else { LeaveOneOut::Nothing }, ..options };
        let (all, root) = (stats(&rewards), [Vec::new()]);
        let (zeros, mut plain, mut rooted) = (vec![0; all.len()], State::default(), State::default());
        let keys = Keys::new(&root, &zeros, all.len()).unwrap();
        for update in [true, false, true] {
            let expected = plain.advance(&options, &all, &Keys::ROOT, update, None).unwrap();
            let got = rooted.advance(&options, &all, &keys, update, None).unwrap();
            prop_assert_eq!(got, expected);
            prop_assert_eq!(rooted.tree().root, plain.tree().root);
        }
    }

    #[test]
    fn the_blend_is_between_the_key_and_its_parent((rewards, of_group) in keyed(), kappa in 0.0_f64..50.0) {
        let (all, paths) = (stats(&rewards), paths());
        let keys = Keys::new(&paths, &of_group, all.len()).unwrap();
        let options = Options { kappa, ..Options::default() };
        let mut state = State::default();
        state.advance(&options, &all, &keys, true, None).unwrap();
        for path in paths.iter().filter(|path| !path.is_empty()) {
            let blended = state.tree().shrunken(path, &options);
            let parent = state.tree().shrunken(&path[..path.len() - 1], &options);
            let Some(prior) = state.tree().get(path) else {
                prop_assert_eq!(blended, parent);
                continue;
            };
            let own = Shrinkage::new(&prior, &options);
            for (value, a, b) in [
                (blended.mu, own.mu, parent.mu),
                (blended.sigma2, own.sigma2, parent.sigma2),
                (blended.tau2, own.tau2, parent.tau2),
            ] {
                let h = kappa / (kappa + prior.means().count());
                prop_assert!(close(value, (1.0 - h) * a + h * b));
                prop_assert!(value >= a.min(b) - 1e-12 && value <= a.max(b) + 1e-12);
            }
        }
    }

    #[test]
    fn leaving_one_out_is_having_never_seen_it((rewards, of_group) in keyed(), pick in 0_usize..9, options in options()) {
        let (all, paths) = (stats(&rewards), paths());
        let pick = pick % all.len();
        let options = Options { leave_one_out: LeaveOneOut::Group, score: Score::After, ..options };
        let keys = Keys::new(&paths, &of_group, all.len()).unwrap();
        let scored = State::default().advance(&options, &all, &keys, true, None).unwrap();
        let (mut rest, mut keys_of_rest) = (rewards.clone(), of_group.clone());
        let own: Vec<f64> = rest.drain(pick * SIZE..(pick + 1) * SIZE).collect();
        let key = [keys_of_rest.remove(pick)];
        let mut without = State::default();
        let others = stats(&rest);
        let plain = Options { leave_one_out: LeaveOneOut::Nothing, ..options };
        without.advance(&plain, &others, &Keys::new(&paths, &keys_of_rest, others.len()).unwrap(), true, None).unwrap();
        let group = stats(&own);
        let frozen = without.advance(&plain, &group, &Keys::new(&paths, &key, 1).unwrap(), false, None).unwrap();
        prop_assert!(close(scored.baseline[pick], frozen.baseline[0]), "{:?} {:?}", scored, frozen);
    }

    #[test]
    fn a_row_left_out_is_scored_by_the_others((rewards, of_group) in keyed(), pick in 0_usize..9, options in options()) {
        let (all, paths) = (stats(&rewards), paths());
        let pick = pick % all.len();
        let options = Options { leave_one_out: LeaveOneOut::Row, normalize: Normalize::None, score: Score::After, ..options };
        let scored =
            State::default().advance(&options, &all, &Keys::new(&paths, &of_group, all.len()).unwrap(), true, None).unwrap();
        let batch = Batch::new(&rewards, Layout::Equal { size: SIZE }, None).unwrap();
        let mut advantages = vec![0.0; rewards.len()];
        apply(&batch, &scored.affine, &mut advantages);
        // The other groups are the prior, the group's other two rows the mean.
        let (mut rest, mut keys_of_rest) = (rewards.clone(), of_group.clone());
        let own: Vec<f64> = rest.drain(pick * SIZE..(pick + 1) * SIZE).collect();
        let key = [keys_of_rest.remove(pick)];
        let plain = Options { leave_one_out: LeaveOneOut::Nothing, ..options };
        let (mut without, others) = (State::default(), stats(&rest));
        without.advance(&plain, &others, &Keys::new(&paths, &keys_of_rest, others.len()).unwrap(), true, None).unwrap();
        for row in 0..SIZE {
            let mut two = own.clone();
            two.remove(row);
            let two = GroupStats::collect(&Batch::new(&two, Layout::Equal { size: 2 }, None).unwrap()).unwrap();
            let frozen = without.advance(&plain, &two, &Keys::new(&paths, &key, 1).unwrap(), false, None).unwrap();
            let (got, expected) = (advantages[pick * SIZE + row], own[row] - frozen.baseline[0]);
            prop_assert!(close(got, expected), "{} {}", got, expected);
        }
    }

    #[test]
    fn a_prompt_is_left_out_with_all_its_groups((rewards, of_group) in keyed(), pick in 0_usize..9, options in options()) {
        let (all, paths) = (stats(&rewards), paths());
        let prompts: Vec<u32> = (0_u32..).map(|group| group / 2).take(all.len()).collect();
        let pick = pick % all.len();
        let options = Options { leave_one_out: LeaveOneOut::Group, score: Score::After, ..options };
        let keys = Keys::new(&paths, &of_group, all.len()).unwrap().with_prompts(&prompts, all.len()).unwrap();
        let scored = State::default().advance(&options, &all, &keys, true, None).unwrap();
        let of_others = |group: &usize| prompts[*group] != prompts[pick];
        let kept: Vec<usize> = (0..all.len()).filter(of_others).collect();
        let rest: Vec<f64> = kept.iter().flat_map(|g| rewards[g * SIZE..(g + 1) * SIZE].to_vec()).collect();
        let keys_of_rest: Vec<u32> = kept.iter().map(|g| of_group[*g]).collect();
        let plain = Options { leave_one_out: LeaveOneOut::Nothing, ..options };
        let (mut without, others) = (State::default(), stats(&rest));
        without.advance(&plain, &others, &Keys::new(&paths, &keys_of_rest, others.len()).unwrap(), true, None).unwrap();
        let (group, key) = (stats(&rewards[pick * SIZE..(pick + 1) * SIZE]), [of_group[pick]]);
        let frozen = without.advance(&plain, &group, &Keys::new(&paths, &key, 1).unwrap(), false, None).unwrap();
        prop_assert!(close(scored.baseline[pick], frozen.baseline[0]), "{:?} {:?}", scored, frozen);
        prop_assert!(Keys::new(&paths, &of_group, all.len()).unwrap().with_prompts(&prompts[1..], all.len()).is_err());
    }

    #[test]
    fn a_streamed_group_is_read_against_the_prior_before_it(
        (rewards, of_group) in keyed(), own in proptest::collection::vec(-5.0_f64..5.0, SIZE), key in 0_u32..5
    ) {
        let (all, paths, options) = (stats(&rewards), paths(), Options::default());
        let mut state = State::default();
        state.advance(&options, &all, &Keys::new(&paths, &of_group, all.len()).unwrap(), true, None).unwrap();
        let prior = state.tree().shrunken(&paths[key as usize], &options);
        let (batch, group) = (Batch::new(&own, Layout::Equal { size: SIZE }, None).unwrap(), stats(&own));
        let of_one = [key];
        let keys = Keys::new(&paths, &of_one, 1).unwrap();
        let scored = state.stream(&options, &group, &keys, true, None).unwrap();
        let mut out = vec![f64::NAN; SIZE];
        apply(&batch, &scored.affine, &mut out);
        let mean = own.iter().sum::<f64>() / SIZE as f64;
        let baseline = mean + prior.factor(SIZE as f64) * (prior.mu - mean);
        for (r, a) in own.iter().zip(&out) {
            prop_assert!(close(*a * (prior.sigma2.sqrt() + options.eps), r - baseline), "{} {}", a, r);
        }
        prop_assert_eq!(state.tree().root.means().count(), (all.len() + 1) as f64);
    }
}

#[test]
fn an_idle_key_becomes_young_again() {
    let options = Options { decay: 0.5, ..Options::default() };
    let paths = paths();
    let mut state = State::default();
    let one = |state: &mut State, rewards: &[f64], key: u32| {
        let of_group = [key];
        state.advance(&options, &stats(rewards), &Keys::new(&paths, &of_group, 1).unwrap(), true, None).unwrap();
    };
    one(&mut state, &[0.0; SIZE], 1);
    for _ in 0..60 {
        one(&mut state, &[1.0; SIZE], 4);
    }
    assert_eq!(state.tree().get(&paths[1]).unwrap().means().count(), 0.5_f64.powi(60));
    assert!((state.tree().shrunken(&paths[1], &options).mu - 1.0).abs() < 1e-12);
    // So does one that is idle while batches come without keys.
    state.advance(&options, &stats(&[1.0; SIZE]), &Keys::ROOT, true, None).unwrap();
    assert_eq!(state.tree().get(&paths[1]).unwrap().means().count(), 0.5_f64.powi(61));
}

#[test]
fn there_is_room_for_so_many_keys() {
    let (paths, options) = (paths(), Options { max_keys: 3, ..Options::default() });
    let all = stats(&[0.0, 1.0, 0.0, 1.0, 1.0, 0.0]);
    let mut state = State::default();
    state.advance(&options, &all, &Keys::new(&paths, &[2, 3], 2).unwrap(), true, None).unwrap();
    let kept = state.clone();
    let more = Keys::new(&paths, &[2, 4], 2).unwrap();
    assert_eq!(state.advance(&options, &all, &more, true, None), Err(Error::TooManyKeys { count: 6, max_keys: 3 }));
    assert_eq!(state, kept);
    assert!(state.advance(&options, &all, &more, false, None).is_ok());
    let mut other = State::default();
    other.advance(&Options::default(), &all, &more, true, None).unwrap();
    assert!(state.merge(&other, 3).is_err());
    assert_eq!(state, kept);
}

#[test]
fn what_stands_in_for_a_spread_of_zero() {
    let own = [0.0, 1.0, 1.0];
    let root = [Vec::new()];
    let keys = Keys::new(&root, &[0], 1).unwrap();
    for norm_ddof in [0, 1] {
        let options = Options { norm_ddof, eps: 0.0, ..Options::default() };
        let scored = State::default().stream(&options, &stats(&own), &keys, true, None).unwrap();
        let std = (2.0 / 3.0 / (3.0 - f64::from(norm_ddof))).sqrt();
        assert!(close(scored.affine.scale[0], 1.0 / std) && close(scored.affine.offset[0], 2.0 / 3.0));
        let equal = State::default().stream(&options, &stats(&[0.5; SIZE]), &keys, true, None).unwrap();
        assert_eq!(equal.affine.scale, [0.0]);
        let raw = Options { normalize: Normalize::None, ..options };
        assert_eq!(State::default().stream(&raw, &stats(&own), &keys, true, None).unwrap().affine.scale, [1.0]);
    }
}

#[test]
fn impossible_trees_and_keys_are_refused() {
    let prior = Prior::of(&stats(&[0.0, 1.0, 1.0]));
    let twice = Prior::of(&stats(&[0.0, 1.0, 1.0, 0.0, 0.0, 1.0]));
    let tree = |keys: &[(&str, isize, Prior)]| {
        let mut columns = Columns::default();
        for (part, parent, prior) in keys {
            columns.names.push_str(part);
            columns.lengths.push(part.len());
            columns.parents.push(*parent);
            columns.statistics.extend(prior.parts());
            columns.idle.push(0);
        }
        columns.into_tree(twice, 1.0, 0)
    };
    assert!(tree(&[("a", -1, prior), ("b", 0, prior)]).is_ok());
    assert!(matches!(tree(&[("a", -1, prior), ("a", -1, prior)]), Err(Error::InvalidKey { .. })));
    for keys in [vec![("", -1, prior)], vec![("a", 0, prior)], vec![("a", 1, prior), ("b", -1, prior)]] {
        assert!(matches!(tree(&keys), Err(Error::InvalidState { .. })), "{keys:?}");
    }
    let paths = paths();
    assert!(matches!(Keys::new(&paths, &[0, 1], 3), Err(Error::LengthMismatch { .. })));
    assert!(matches!(Keys::new(&paths, &[0, 5], 2), Err(Error::GroupOutOfRange { .. })));
    assert!(Options { kappa: f64::NAN, ..Options::default() }.validate().is_err());
}
