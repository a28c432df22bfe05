//! The kernel of equal groups against the general path: the same advantages and the same state, to rounding.

use ebpo_core::{
    Batch, DecayBy, EqualGroups, Error, Float, GroupStats, Keys, Layout, LeaveOneOut, Normalize, Options, Path, Score,
    Sigma2, State, Tau2, apply,
};
use proptest::prelude::*;

fn path(parts: &[&str]) -> Path {
    parts.iter().map(ToString::to_string).collect()
}

/// Prefixes that are shared, a key under which groups stand too, and one path twice.
fn paths() -> Vec<Path> {
    vec![path(&["a"]), path(&[]), path(&["a", "1"]), path(&["b"]), path(&["a", "2"]), path(&["b"])]
}

fn close(a: f64, b: f64, scale: f64) -> bool {
    (a - b).abs() <= 1e-11 * scale.max(a.abs()).max(1.0)
}

fn same_state(a: &State, b: &State) -> bool {
    let numbers = |state: &State| -> Vec<f64> {
        let (tree, mut all) = (state.tree(), Vec::new());
        all.extend(tree.root.parts());
        all.extend(tree.priors().flat_map(|prior| prior.parts()));
        all
    };
    let (a_numbers, b_numbers) = (numbers(a), numbers(b));
    a.step() == b.step()
        && a_numbers.len() == b_numbers.len()
        && a.tree().clock() == b.tree().clock()
        && a_numbers.iter().zip(&b_numbers).all(|(a, b)| close(*a, *b, 1e3))
}

/// A call of the general path; what it wrote.
fn general<T: Float>(
    state: &mut State,
    options: &Options,
    rewards: &[T],
    size: usize,
    keys: &Keys<'_>,
    call: (bool, Option<i64>),
) -> Result<Vec<T>, Error> {
    let batch = Batch::new(rewards, Layout::Equal { size }, None)?;
    let scored = state.advance(options, &GroupStats::collect(&batch)?, keys, call.0, call.1)?;
    let mut out = vec![T::default(); rewards.len()];
    apply(&batch, &scored.affine, &mut out);
    Ok(out)
}

/// The same by the kernel; None where it leaves the batch to the general path.
fn equal<T: Float>(
    state: &mut State,
    options: &Options,
    rewards: &[T],
    size: usize,
    keys: &Keys<'_>,
    call: (bool, Option<i64>),
) -> Result<Option<Vec<T>>, Error> {
    let Some(batch) = EqualGroups::collect(rewards, size, *keys, 1) else { return Ok(None) };
    let Some(targets) = state.advance_equal(options, &batch, call.0, call.1)? else { return Ok(None) };
    let mut out = vec![T::default(); rewards.len()];
    batch.write(options, &targets.blended, 1, &mut out);
    let mut mapped = vec![T::default(); rewards.len()];
    apply(&Batch::new(rewards, Layout::Equal { size }, None)?, &batch.affine(options, &targets.blended), &mut mapped);
    assert!(out.iter().zip(&mapped).all(|(a, b)| a.widen().to_bits() == b.widen().to_bits()));
    Ok(Some(out))
}

fn options() -> impl Strategy<Value = Options> {
    let normalize = prop_oneof![Just(Normalize::Batch), Just(Normalize::Scale), Just(Normalize::None)];
    let shrinkage = prop_oneof![Just(None), prop_oneof![Just(0.0), Just(1.0), 0.0_f64..1.0].prop_map(Some)];
    (normalize, any::<[bool; 4]>(), prop_oneof![Just(1.0), 0.1_f64..1.0], 0.0_f64..20.0, shrinkage).prop_map(
        |(normalize, [before, by_visit, within, debiased], decay, kappa, shrinkage)| Options {
            normalize,
            decay,
            kappa,
            score: if before { Score::Before } else { Score::After },
            decay_by: if by_visit { DecayBy::Visit } else { DecayBy::Update },
            sigma2: if within && shrinkage.is_none() { Sigma2::Within } else { Sigma2::Total },
            tau2: if debiased && shrinkage.is_none() { Tau2::Debiased } else { Tau2::Raw },
            shrinkage,
            ..Options::default()
        },
    )
}

/// A batch: its group size, its rewards, the index of each group's path or the root for all, and how it is passed.
type Call = (usize, Vec<f64>, Option<Vec<u32>>, (bool, Option<i64>));

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let call = (prop_oneof![1_usize..6, Just(8), Just(16)], 1_usize..12).prop_flat_map(|(size, groups)| {
        // Few values, so that whole groups are equal; an offset, so that a far prior is one.
        let reward = prop_oneof![Just(0.0), Just(1.0), -5.0_f64..5.0];
        let rewards = (proptest::collection::vec(reward, groups * size), prop_oneof![Just(0.0), Just(100.0)])
            .prop_map(|(rewards, offset)| rewards.into_iter().map(|r| r + offset).collect::<Vec<f64>>());
        let keys = proptest::option::weighted(0.8, proptest::collection::vec(0_u32..6, groups));
        (Just(size), rewards, keys, (any::<bool>(), proptest::option::of(0_i64..4)))
    });
    proptest::collection::vec(call, 1..6)
}

fn compare<T: Float>(calls: &[Call], options: &Options, narrow: f64) {
    let (paths, mut ours, mut theirs) = (paths(), State::default(), State::default());
    for (size, rewards, of_group, call) in calls {
        let rewards: Vec<T> = rewards.iter().map(|&r| T::narrow(r)).collect();
        let groups = rewards.len() / size;
        let keys = of_group.as_ref().map_or(Keys::ROOT, |of_group| Keys::new(&paths, of_group, groups).unwrap());
        let got = equal(&mut ours, options, &rewards, *size, &keys, *call).unwrap().unwrap();
        let expected = general(&mut theirs, options, &rewards, *size, &keys, *call).unwrap();
        for (a, b) in got.iter().zip(&expected) {
            // A spread of nothing but rounding is divided by eps.
            assert!((a.widen() - b.widen()).abs() <= narrow * b.widen().abs().max(1.0), "{} {}", a.widen(), b.widen());
        }
        assert!(same_state(&ours, &theirs), "{ours:?} {theirs:?}");
        assert!(same_state(&ours.before_update(), &theirs.before_update()));
    }
}

proptest! {
    #[test]
    fn the_kernel_equals_the_general_path(calls in calls(), options in options()) {
        compare::<f64>(&calls, &options, 1e-5);
        compare::<f32>(&calls, &options, 1e-5);
    }
}

#[test]
fn groups_of_every_key_at_once_are_as_exact_as_one() {
    let keys: Vec<Path> = (0..600).map(|key| path(&[&format!("{key}")])).collect();
    let of_group: Vec<u32> = (0..1800).map(|group| group % 600).collect();
    let rewards: Vec<f64> = (0..1800 * 8_u32).map(|i| f64::from(i.wrapping_mul(2_654_435_761) >> 31)).collect();
    let keys = Keys::new(&keys, &of_group, 1800).unwrap();
    let options = Options::default();
    let (mut ours, mut theirs) = (State::default(), State::default());
    for _ in 0..2 {
        let got = equal(&mut ours, &options, &rewards, 8, &keys, (true, None)).unwrap().unwrap();
        let expected = general(&mut theirs, &options, &rewards, 8, &keys, (true, None)).unwrap();
        assert!(got.iter().zip(&expected).all(|(a, b)| close(*a, *b, 1.0)));
        assert!(same_state(&ours, &theirs));
    }
}

#[test]
fn equal_rewards_have_exactly_no_advantage() {
    let paths = paths();
    let keys = Keys::new(&paths, &[0, 3, 0, 2], 4).unwrap();
    for value in [0.1, 1e6 + 0.3, -7.7] {
        let rewards = [value; 12];
        let got = equal(&mut State::default(), &Options::default(), &rewards, 3, &keys, (true, None)).unwrap();
        assert_eq!(got, Some(vec![0.0; 12]));
    }
}

#[test]
fn nothing_changes_where_there_is_no_room() {
    let (paths, options) = (paths(), Options { max_keys: 1, ..Options::default() });
    let rewards = [0.0, 1.0, 1.0, 1.0];
    let mut state = State::default();
    let first = Keys::new(&paths, &[0, 0], 2).unwrap();
    assert!(equal(&mut state, &options, &rewards, 2, &first, (true, Some(1))).unwrap().is_some());
    let kept = (state.clone(), state.before_update());
    let more = Keys::new(&paths, &[0, 3], 2).unwrap();
    let refused = equal(&mut state, &options, &rewards, 2, &more, (true, Some(2)));
    assert_eq!(refused, Err(Error::TooManyKeys { count: 2, max_keys: 1 }));
    assert_eq!((state.clone(), state.before_update()), kept);
    assert!(equal(&mut state, &options, &rewards, 2, &more, (false, None)).unwrap().is_some());
    assert_eq!(state, kept.0);
    // Nor where the general path must look.
    let by_group = Options { leave_one_out: LeaveOneOut::Group, ..Options::default() };
    assert_eq!(equal(&mut state, &by_group, &rewards, 2, &more, (true, Some(3))), Ok(None));
    assert_eq!(equal(&mut state, &options, &[0.0, f64::NAN], 1, &more, (true, Some(3))), Ok(None));
    assert_eq!(state, kept.0);
}

#[test]
fn a_far_key_leaves_no_room_for_f32() {
    let paths = paths();
    let options = Options { decay: 1e-6, decay_by: DecayBy::Visit, ..Options::default() };
    let mut state = State::default();
    let far = Keys::new(&paths, &[0], 1).unwrap();
    general(&mut state, &options, &[3e38_f32, 3e38], 2, &far, (true, None)).unwrap();
    for _ in 0..60 {
        general(&mut state, &options, &[0.0_f32, 1.0], 2, &Keys::ROOT, (true, None)).unwrap();
    }
    assert!(state.tree().root.rewards().mean().abs() < 1.0, "{:?}", state.tree().root);
    let kept = state.clone();
    assert_eq!(equal(&mut state, &options, &[0.0_f32, 1.0], 2, &far, (true, None)), Ok(None));
    assert_eq!(state, kept);
    let near = [path(&["b"])];
    let near = Keys::new(&near, &[0], 1).unwrap();
    assert!(equal(&mut state, &options, &[0.0_f32, 1.0], 2, &near, (true, None)).unwrap().is_some());
}
