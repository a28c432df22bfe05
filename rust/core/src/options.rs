//! The estimator's options: the paper's choices are the defaults, the others answer its known weak spots.

use crate::Error;

/// Centre and divisor of the raw advantages (step 6 of Algorithm 1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Normalize {
    /// `(raw - mean(raw)) / (std(raw) + eps)` over the batch: the paper's.
    #[default]
    Batch,
    /// `raw / (rms(raw) + eps)`: no centring, so a failed group keeps its negative sign.
    Scale,
    /// `raw`.
    None,
}

/// Which variance of rewards is the noise of a group's mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sigma2 {
    /// Variance of all rewards seen: the paper's.
    #[default]
    Total,
    /// Variance within groups, pooled; `Total` until some group has had two rows.
    Within,
}

/// Which variance of group means is the spread of the prior.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tau2 {
    /// Variance of the observed group means: the paper's.
    #[default]
    Raw,
    /// The same less its sampling noise, at least 0 (method of moments).
    Debiased,
}

/// Order of update and score: is the batch in the prior it is scored with?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Score {
    /// Update, then score: the paper's.
    #[default]
    After,
    /// Score, then update.
    Before,
}

/// What counts the time in which a prior forgets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DecayBy {
    /// Every update of the estimator discounts every prior.
    #[default]
    Update,
    /// An update discounts the priors that it has a group for, and no other.
    Visit,
}

/// What a row's baseline must not have seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LeaveOneOut {
    /// The batch is in its own prior, and a row in its group's mean: the paper's.
    #[default]
    Nothing,
    /// The prior leaves the row's group out.
    Group,
    /// The same, and the group's mean leaves the row out: the policy gradient is unbiased.
    Row,
}

macro_rules! parsed {
    ($type:ident, $option:literal, $expected:literal, $($name:literal => $variant:ident),+) => {
        impl $type {
            /// The variant of that name.
            pub fn parse(name: &str) -> Result<Self, Error> {
                match name {
                    $($name => Ok(Self::$variant),)+
                    _ => Err(Error::InvalidOption {
                        name: $option,
                        value: format!("{name:?}"),
                        expected: $expected,
                    }),
                }
            }
        }
    };
}

parsed!(Normalize, "normalize", "\"batch\", \"scale\" or \"none\"", "batch" => Batch, "scale" => Scale, "none" => None);
parsed!(Sigma2, "sigma2", "\"total\" or \"within\"", "total" => Total, "within" => Within);
parsed!(Tau2, "tau2", "\"raw\" or \"debiased\"", "raw" => Raw, "debiased" => Debiased);
parsed!(Score, "score", "\"after\" or \"before\"", "after" => After, "before" => Before);
parsed!(DecayBy, "decay_by", "\"update\" or \"visit\"", "update" => Update, "visit" => Visit);
parsed!(
    LeaveOneOut, "leave_one_out", "False, True (which is \"group\") or \"row\"",
    "group" => Group, "row" => Row
);

/// Every option of the estimator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Step 6.
    pub normalize: Normalize,
    /// The noise variance.
    pub sigma2: Sigma2,
    /// The prior variance.
    pub tau2: Tau2,
    /// Order of update and score.
    pub score: Score,
    /// What a row's baseline leaves out.
    pub leave_one_out: LeaveOneOut,
    /// S of every group, in [0, 1], in the place of the estimated one.
    pub shrinkage: Option<f64>,
    /// Weight that the past keeps at each update, in (0, 1].
    pub decay: f64,
    /// The updates that the past of a prior is discounted at.
    pub decay_by: DecayBy,
    /// Added to the denominator of step 6.
    pub eps: f64,
    /// Delta degrees of freedom of sigma2 `Total` and tau2 `Raw`: 0 or 1.
    pub ddof: u8,
    /// Delta degrees of freedom of the standard deviation of step 6: 0 or 1.
    pub norm_ddof: u8,
    /// Groups that a key's parent is worth when the two are blended; see [`Tree::shrunken`](crate::Tree::shrunken).
    pub kappa: f64,
    /// Most priors kept beside the root's.
    pub max_keys: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            normalize: Normalize::Batch,
            sigma2: Sigma2::Total,
            tau2: Tau2::Raw,
            score: Score::After,
            leave_one_out: LeaveOneOut::Nothing,
            shrinkage: None,
            decay: 1.0,
            decay_by: DecayBy::Update,
            eps: 1e-6,
            ddof: 0,
            norm_ddof: 1,
            kappa: 10.0,
            max_keys: 1024,
        }
    }
}

impl Options {
    /// True where no one S and centre holds for all groups of one size and key.
    pub fn needs_each_group(&self) -> bool {
        self.leave_one_out != LeaveOneOut::Nothing
    }

    /// Refuse values outside their domain and combinations without a meaning.
    pub fn validate(&self) -> Result<(), Error> {
        let invalid = |name, value: String, expected| Err(Error::InvalidOption { name, value, expected });
        if let Some(share) = self.shrinkage {
            if !(0.0..=1.0).contains(&share) {
                let expected = "None, which estimates it, or a number in [0, 1]";
                return invalid("shrinkage", share.to_string(), expected);
            }
            if self.sigma2 != Sigma2::Total || self.tau2 != Tau2::Raw {
                let expected = "None beside sigma2=\"within\" or tau2=\"debiased\", which estimate the S that it replaces: \
                                leave it or them out";
                return invalid("shrinkage", share.to_string(), expected);
            }
        }
        if !(self.decay > 0.0 && self.decay <= 1.0) {
            return invalid("decay", self.decay.to_string(), "a number in (0, 1]; 1 never forgets");
        }
        check_eps(self.eps)?;
        for (name, value) in [("ddof", self.ddof), ("norm_ddof", self.norm_ddof)] {
            if value > 1 {
                return invalid(name, value.to_string(), "0 or 1");
            }
        }
        if !(self.kappa.is_finite() && self.kappa >= 0.0) {
            return invalid("kappa", self.kappa.to_string(), "a finite number, at least 0; 0 lets a key stand alone");
        }
        if self.leave_one_out == LeaveOneOut::Group && self.score == Score::Before {
            let expected = "False with score=\"before\": a prior taken before the update does not hold the batch";
            return invalid("leave_one_out", "True".into(), expected);
        }
        if self.leave_one_out == LeaveOneOut::Row && self.normalize != Normalize::None {
            let expected = "normalize=\"none\" beside it: \"batch\" and \"scale\" divide each advantage by a number that its \
                            own reward is in, and then the gradient is not unbiased";
            return invalid("leave_one_out", "\"row\"".into(), expected);
        }
        Ok(())
    }
}

/// Refuse an `eps` that could turn a denominator negative or not finite.
pub(crate) fn check_eps(eps: f64) -> Result<(), Error> {
    if eps.is_finite() && eps >= 0.0 {
        return Ok(());
    }
    Err(Error::InvalidOption { name: "eps", value: eps.to_string(), expected: "a finite number, at least 0" })
}
