//! Properties of the core against plain formulas, without Python.

use ebpo_core::{
    Affine, Batch, Codes, Error, GroupStats, Keys, Layout, LeaveOneOut, Method, Moments, Normalize, Options, Prior,
    Score, Sigma2, State, Tau2, apply, equal_advantages,
};
use proptest::prelude::*;

fn close(a: f64, b: f64, scale: f64) -> bool {
    (a - b).abs() <= 1e-12 * scale.max(1.0)
}

fn stats(rewards: &[f64], layout: Layout<'_>) -> GroupStats {
    GroupStats::collect(&Batch::new(rewards, layout, None).unwrap()).unwrap()
}

fn advantages(method: Method, rewards: &[f64], layout: Layout<'_>) -> Vec<f64> {
    let mut out = vec![0.0; rewards.len()];
    method.advantages(&Batch::new(rewards, layout, None).unwrap(), &mut out).unwrap();
    out
}

fn written(rewards: &[f64], layout: Layout<'_>, affine: &Affine) -> Vec<f64> {
    let mut out = vec![f64::NAN; rewards.len()];
    apply(&Batch::new(rewards, layout, None).unwrap(), affine, &mut out);
    out
}

fn ebpo(rewards: &[f64], layout: Layout<'_>, options: &Options) -> Vec<f64> {
    let scored = State::default().advance(options, &stats(rewards, layout), &Keys::ROOT, true, None).unwrap();
    written(rewards, layout, &scored.affine)
}

/// Equal groups: rewards and the group size.
fn groups() -> impl Strategy<Value = (Vec<f64>, usize)> {
    (1_usize..9, 1_usize..20)
        .prop_flat_map(|(groups, size)| (proptest::collection::vec(-10.0_f64..10.0, groups * size), Just(size)))
}

fn moments(values: &[f64]) -> Moments {
    let mut m = Moments::default();
    for &v in values {
        m.merge(&Moments::from_parts(1.0, v, 0.0).unwrap());
    }
    m
}

proptest! {
    #[test]
    fn moments_equal_two_passes(values in proptest::collection::vec(-1e3_f64..1e3, 1..200)) {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let m2: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        let m = moments(&values);
        prop_assert_eq!(m.count(), n);
        prop_assert!(close(m.mean(), mean, 1e3));
        prop_assert!(close(m.m2(), m2, m2 * 10.0 + 1e3));
    }

    #[test]
    fn merging_anywhere_equals_the_whole((rewards, size) in groups(), cut in 0_usize..9) {
        let cut = (cut * size).min(rewards.len());
        let whole = Prior::of(&stats(&rewards, Layout::Equal { size }));
        let mut left = Prior::of(&stats(&rewards[..cut], Layout::Equal { size }));
        let mut right = Prior::of(&stats(&rewards[cut..], Layout::Equal { size }));
        let (l, r) = (left, right);
        left.merge(&r);
        right.merge(&l);
        for merged in [left, right] {
            prop_assert_eq!(merged.rewards().count(), whole.rewards().count());
            prop_assert!(close(merged.rewards().mean(), whole.rewards().mean(), 10.0));
            prop_assert!(close(merged.rewards().m2(), whole.rewards().m2(), whole.rewards().m2()));
            prop_assert!(close(merged.means().m2(), whole.means().m2(), whole.rewards().m2()));
            prop_assert!(close(merged.ssw(), whole.ssw(), whole.ssw()));
        }
    }

    #[test]
    fn empty_is_the_identity_of_merge((rewards, size) in groups()) {
        let prior = Prior::of(&stats(&rewards, Layout::Equal { size }));
        let (mut left, mut right) = (prior, Prior::default());
        left.merge(&Prior::default());
        right.merge(&prior);
        prop_assert_eq!(left, prior);
        prop_assert_eq!(right, prior);
    }

    #[test]
    fn total_squares_split_into_within_and_between((rewards, size) in groups()) {
        let prior = Prior::of(&stats(&rewards, Layout::Equal { size }));
        let between = size as f64 * prior.means().m2();
        prop_assert!(close(prior.rewards().m2(), prior.ssw() + between, prior.rewards().m2()));
    }

    #[test]
    fn fast_path_equals_general_path((rewards, size) in groups(), eps in 1e-9_f64..1.0) {
        let general = ebpo(&rewards, Layout::Equal { size }, &Options { eps, ..Options::default() });
        let mut fast = vec![f64::NAN; rewards.len()];
        prop_assert!(equal_advantages(&rewards, size, eps, 1, &mut fast));
        for (f, g) in fast.iter().zip(&general) {
            prop_assert!(close(*f, *g, 10.0), "{} {}", f, g);
        }
    }

    #[test]
    fn codes_equal_rows((rewards, size) in groups()) {
        let codes: Vec<u32> = (0..rewards.len()).map(|row| u32::try_from(row / size).unwrap()).collect();
        let layout = Layout::Codes { codes: &codes, groups: rewards.len() / size };
        let by_code = ebpo(&rewards, layout, &Options::default());
        for (a, b) in by_code.iter().zip(ebpo(&rewards, Layout::Equal { size }, &Options::default())) {
            prop_assert!(close(*a, b, 10.0));
        }
    }

    #[test]
    fn shift_and_scale_do_not_matter((rewards, size) in groups(), shift in -5.0_f64..5.0, scale in 0.5_f64..20.0) {
        let options = Options { eps: 0.0, ..Options::default() };
        let moved: Vec<f64> = rewards.iter().map(|r| r * scale + shift).collect();
        let spread = moments(&rewards).variance(0).sqrt();
        prop_assume!(spread > 1e-3);
        let layout = Layout::Equal { size };
        for (a, b) in ebpo(&rewards, layout, &options).iter().zip(ebpo(&moved, layout, &options)) {
            prop_assert!(close(*a, b, 1e3 / spread), "{} {}", a, b);
        }
    }

    #[test]
    fn batch_normalised_advantages_have_mean_zero_and_unit_spread((rewards, size) in groups()) {
        let options = Options { eps: 0.0, norm_ddof: 0, ..Options::default() };
        let a = moments(&ebpo(&rewards, Layout::Equal { size }, &options));
        prop_assume!(moments(&rewards).variance(0) > 1e-6);
        prop_assert!(a.mean().abs() < 1e-9);
        prop_assert!((a.variance(0) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn shrinkage_is_a_proportion_and_falls_with_the_group((rewards, size) in groups(), within: bool, debiased: bool) {
        let options = Options {
            sigma2: if within { Sigma2::Within } else { Sigma2::Total },
            tau2: if debiased { Tau2::Debiased } else { Tau2::Raw },
            ..Options::default()
        };
        let mut uneven = rewards.clone();
        uneven.extend_from_slice(&rewards); // group 0 of `size` rows, group 1 of the rest
        let split = u32::try_from(size).unwrap();
        let codes: Vec<u32> = (0..).take(uneven.len()).map(|row: u32| u32::from(row >= split)).collect();
        let layout = Layout::Codes { codes: &codes, groups: 2 };
        let scored = State::default().advance(&options, &stats(&uneven, layout), &Keys::ROOT, true, None).unwrap();
        prop_assert!(scored.shrinkage.iter().all(|s| (0.0..=1.0).contains(s)));
        prop_assert!(scored.shrinkage[1] <= scored.shrinkage[0]);
    }

    #[test]
    fn leave_one_out_equals_a_prior_without_the_group((rewards, size) in groups(), pick in 0_usize..9) {
        let layout = Layout::Equal { size };
        let all = stats(&rewards, layout);
        let pick = pick % all.len();
        let options = Options { leave_one_out: LeaveOneOut::Group, ..Options::default() };
        let scored = State::default().advance(&options, &all, &Keys::ROOT, true, None).unwrap();
        let mut rest = rewards.clone();
        rest.drain(pick * size..(pick + 1) * size);
        let mut without = State::default();
        without.advance(&Options::default(), &stats(&rest, layout), &Keys::ROOT, true, None).unwrap();
        let own = &rewards[pick * size..(pick + 1) * size];
        let frozen = without.advance(&Options::default(), &stats(own, layout), &Keys::ROOT, false, None).unwrap();
        prop_assert!(close(scored.baseline[pick], frozen.baseline[0], 1e4), "{:?} {:?}", scored, frozen);
    }

    #[test]
    fn rloo_is_the_mean_of_the_others((rewards, size) in groups()) {
        prop_assume!(size > 1);
        let layout = Layout::Equal { size };
        let got = advantages(Method::Rloo, &rewards, layout);
        for (row, a) in got.iter().enumerate() {
            let group = &rewards[row / size * size..][..size];
            let others = (group.iter().sum::<f64>() - rewards[row]) / (size - 1) as f64;
            prop_assert!(close(*a, rewards[row] - others, 100.0));
        }
    }

    #[test]
    fn codes_are_dense_and_faithful(ids in proptest::collection::vec(-3_i64..4, 0..40)) {
        let (codes, groups) = Codes::of(ids.iter().copied()).unwrap().into_parts();
        prop_assert_eq!(codes.iter().max().map_or(0, |m| m + 1), groups);
        for (i, a) in ids.iter().enumerate() {
            for (j, b) in ids.iter().enumerate() {
                prop_assert_eq!(a == b, codes[i] == codes[j]);
            }
        }
    }
}

#[test]
fn rewards_out_of_range_are_found_wherever_they_are() {
    for bad in [f64::INFINITY, f64::NEG_INFINITY, 1.0001e140, -1e200, f64::MAX] {
        for row in 0..6 {
            let mut rewards = [0.25; 6];
            rewards[row] = bad;
            let equal = Batch::new(&rewards, Layout::Equal { size: 3 }, None).unwrap();
            let codes = [0, 1, 0, 1, 0, 1];
            let coded = Batch::new(&rewards, Layout::Codes { codes: &codes, groups: 2 }, None).unwrap();
            let expected = Err(Error::RewardOutOfRange { index: row, value: bad });
            assert_eq!(GroupStats::collect(&equal), expected);
            assert_eq!(GroupStats::collect(&coded), expected);
            let mut out = [7.0; 6];
            assert!(!equal_advantages(&rewards, 3, 1e-6, 1, &mut out));
            assert_eq!(out, [7.0; 6]);
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let rewards: Vec<f64> = (0..1_600_003 * 2_u32).map(|i| f64::from(i.wrapping_mul(2_654_435_761) >> 20)).collect();
    for (size, len) in [(2, rewards.len()), (3, 3_200_001)] {
        let with = |threads: usize| {
            let mut out = vec![f64::NAN; len];
            assert!(equal_advantages(&rewards[..len], size, 1e-6, threads, &mut out));
            out
        };
        let alone = with(1);
        assert!(alone.iter().all(|a| a.is_finite()));
        for threads in [2, 3, 7, 64] {
            assert_eq!(with(threads), alone, "groups of {size}, {threads} threads");
        }
    }
}

#[test]
fn threads_leave_the_same_batches_to_the_general_path() {
    let mut rewards = vec![0.5_f32; 1 << 21];
    rewards[1_234_567] = f32::NAN;
    for (size, len) in [(4, rewards.len()), (0, rewards.len()), (3, rewards.len()), (4, 0)] {
        let mut out = vec![7.0; len];
        assert!(!equal_advantages(&rewards[..len], size, 1e-6, 4, &mut out));
        assert!(out.iter().all(|&a| a == 7.0), "groups of {size}, {len} rewards");
    }
}

#[test]
fn the_largest_rewards_are_fine() {
    let rewards = [1e140, -1e140, 1e140, 0.0];
    let got = ebpo(&rewards, Layout::Equal { size: 2 }, &Options::default());
    assert!(got.iter().all(|a| a.is_finite()) && got[0] > 0.0 && got[1] < 0.0);
}

#[test]
fn unscorable_rows_get_zero_and_do_not_count() {
    let rewards = [1.0, f64::NAN, 0.0, 5.0];
    let mask = [true, true, true, false];
    let batch = Batch::new(&rewards, Layout::Equal { size: 2 }, Some(&mask)).unwrap();
    let stats = GroupStats::collect(&batch).unwrap();
    assert_eq!(stats.counts(), [1.0, 1.0]);
    let scored = State::default().advance(&Options::default(), &stats, &Keys::ROOT, true, None).unwrap();
    let mut out = [7.0; 4];
    apply(&batch, &scored.affine, &mut out);
    assert_eq!((out[1], out[3]), (0.0, 0.0));
    assert_eq!(scored.targets.prior.rewards().count(), 2.0);
}

#[test]
fn malformed_batches_are_refused() {
    let rewards = [0.0; 4];
    assert!(matches!(Batch::new(&rewards, Layout::Equal { size: 3 }, None), Err(Error::NotDivisible { .. })));
    assert!(matches!(Batch::new(&rewards, Layout::Equal { size: 0 }, None), Err(Error::NotDivisible { .. })));
    let mask = Some(&[true; 3][..]);
    assert!(matches!(Batch::new(&rewards, Layout::Equal { size: 2 }, mask), Err(Error::LengthMismatch { .. })));
    let short = Layout::Codes { codes: &[0; 3], groups: 1 };
    assert!(matches!(Batch::new(&rewards, short, None), Err(Error::LengthMismatch { .. })));
    let wild = Layout::Codes { codes: &[0, 1, 2, 1], groups: 2 };
    assert!(matches!(Batch::new(&rewards, wild, None), Err(Error::GroupOutOfRange { index: 2, code: 2, .. })));
}

#[test]
fn options_outside_their_domain_are_refused() {
    let bad = [
        Options { decay: 0.0, ..Options::default() },
        Options { decay: f64::NAN, ..Options::default() },
        Options { eps: -1.0, ..Options::default() },
        Options { ddof: 2, ..Options::default() },
        Options { leave_one_out: LeaveOneOut::Group, score: Score::Before, ..Options::default() },
        Options { leave_one_out: LeaveOneOut::Row, ..Options::default() },
        Options { shrinkage: Some(1.1), ..Options::default() },
        Options { shrinkage: Some(f64::NAN), ..Options::default() },
        Options { shrinkage: Some(0.5), tau2: Tau2::Debiased, ..Options::default() },
        Options { leave_one_out: LeaveOneOut::Row, normalize: Normalize::Scale, ..Options::default() },
    ];
    assert!(bad.iter().all(|options| options.validate().is_err()));
    assert_eq!(Options::default().validate(), Ok(()));
    assert_eq!(Normalize::parse("scale"), Ok(Normalize::Scale));
    assert!(Tau2::parse("Raw").is_err());
}

#[test]
fn a_replayed_step_scores_and_does_not_update() {
    let batch = stats(&[1.0, 0.0, 0.0, 0.0], Layout::Equal { size: 2 });
    let mut state = State::default();
    let first = state.advance(&Options::default(), &batch, &Keys::ROOT, true, Some(5)).unwrap();
    let kept = state.clone();
    let again = state.advance(&Options::default(), &batch, &Keys::ROOT, true, Some(5)).unwrap();
    assert_eq!((again.affine, state), (first.affine, kept));
}

#[test]
fn a_batch_without_a_valid_row_leaves_the_prior_alone() {
    let options = Options { decay: 0.5, ..Options::default() };
    let mut state = State::default();
    state.advance(&options, &stats(&[1.0, 0.0], Layout::Equal { size: 2 }), &Keys::ROOT, true, Some(1)).unwrap();
    let kept = state.tree().root;
    state
        .advance(&options, &stats(&[f64::NAN, f64::NAN], Layout::Equal { size: 2 }), &Keys::ROOT, true, Some(2))
        .unwrap();
    assert_eq!((state.tree().root, state.step()), (kept, Some(2)));
}

#[test]
fn impossible_priors_are_refused() {
    let rewards = Moments::from_parts(12.0, 0.5, 3.0).unwrap();
    let means = Moments::from_parts(3.0, 0.5, 0.25).unwrap();
    assert!(Prior::from_parts(rewards, means, 2.0, 9.0, 0.75).is_ok());
    let empty = Moments::default();
    for (r, m, ssw, dof, inv_n) in [
        (rewards, means, 3.1, 9.0, 0.75),
        (rewards, means, 2.0, 8.0, 0.75),
        (rewards, means, 2.0, 9.0, 3.1),
        (rewards, means, -1.0, 9.0, 0.75),
        (rewards, means, 2.0, f64::NAN, 0.75),
        (rewards, empty, 2.0, 9.0, 0.75),
        (empty, means, 0.0, 0.0, 0.0),
        (means, rewards, 0.1, 0.0, 0.75),
    ] {
        assert!(Prior::from_parts(r, m, ssw, dof, inv_n).is_err(), "{r:?} {m:?} {ssw} {dof} {inv_n}");
    }
}

#[test]
fn tiny_spreads_without_eps_stay_finite() {
    let rewards = [0.0, 2e-162, -1e-162, -1e-162];
    for method in [Method::Grpo(0.0), Method::ReinforcePp(0.0), Method::Rloo, Method::JamesStein] {
        let got = advantages(method, &rewards, Layout::Equal { size: 4 });
        assert!(got.iter().all(|a| a.abs() < 10.0), "{method:?}");
    }
}

#[test]
fn everything_forgotten_is_empty() {
    let mut prior = Prior::of(&stats(&[1.0, 0.0], Layout::Equal { size: 2 }));
    for _ in 0..2000 {
        prior.decay(0.5);
    }
    assert_eq!(prior, Prior::default());
}
