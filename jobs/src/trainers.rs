//! Which trainers a rank knows: those that are built in, or those of a program of the user's own (docs/own-trainer.md). Owns the choice by name and the
//! check that no section of a spec is nobody's; computes nothing.

use crate::config::Spec;
use crate::{JobError, Plan, Train, train};

/// A trainer of a user's program: what `trainer = "NAME"` means in a spec that names the program.
///
/// ```ignore
/// use stoke_jobs::{JobError, Plan, Spec, Train, Trainer};
///
/// fn check(spec: &Spec<'_>) -> Result<(), JobError> {
///     spec.section::<toml::Table>("prose").map(drop)
/// }
/// fn load(spec: &Spec<'_>, plan: Plan) -> Result<Box<dyn Train>, JobError> {
///     check(spec)?;
///     let task = read_data_and_make_model(spec, &plan)?; // data, model and loss: see `Task`
///     Ok(Box::new(Engine::new(..)?))
/// }
/// const PROSE: Trainer = Trainer { name: "prose", sections: &["prose"], check, load };
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Trainer {
    /// As specs write it: up to 63 letters, digits, `-`, `_` and `.`.
    pub name: &'static str,
    /// Sections of the spec that are this trainer's own, besides `[data]`, `[model]`, `[optimizer]` and `[schedule]`. Any other one is refused, so that
    /// a section whose name was mistyped is not passed over.
    pub sections: &'static [&'static str],
    /// Whether the spec's sections say something that can be run. Touches no data: it runs where the job is submitted, and again in each rank.
    pub check: fn(&Spec<'_>) -> Result<(), JobError>,
    /// Reads the data and makes the model with its first weights. Called once in each rank, or twice where the length of the job is given in epochs, which only
    /// [`Train::samples`] turns into steps, and [`Train::set_steps`] is not implemented.
    pub load: Load,
}

/// See [`Trainer::load`].
pub type Load = fn(&Spec<'_>, Plan) -> Result<Box<dyn Train>, JobError>;

/// The trainers of a rank's program.
#[derive(Clone, Copy, Debug)]
pub enum Trainers {
    /// Of `stoke` itself.
    BuiltIn,
    /// Of a user's program; nothing that is built in is among them.
    Own(&'static [Trainer]),
}

/// Sections that every job that trains may have.
const SECTIONS: [&str; 8] = ["train", "resources", "checkpoint", "restart", "data", "model", "optimizer", "schedule"];

impl Trainers {
    /// The trainer of that name, with its data and its model.
    pub fn load(self, config_toml: &str, trainer: &str, plan: Plan) -> Result<Box<dyn Train>, JobError> {
        match self {
            Self::BuiltIn => train::load(config_toml, trainer, plan),
            Self::Own(trainers) => {
                let (spec, trainer) = own(config_toml, trainer, trainers)?;
                (trainer.load)(&spec, plan)
            }
        }
    }

    /// Whether the spec's sections can be run, without touching the data. `lanes` is of the whole job.
    pub fn check(self, config_toml: &str, trainer: &str, lanes: u32) -> Result<(), JobError> {
        match self {
            Self::BuiltIn => train::check(config_toml, trainer, lanes),
            Self::Own(trainers) => {
                let (spec, trainer) = own(config_toml, trainer, trainers)?;
                (trainer.check)(&spec)
            }
        }
    }
}

fn own<'a>(text: &'a str, name: &str, trainers: &'static [Trainer]) -> Result<(Spec<'a>, &'static Trainer), JobError> {
    let spec = Spec::new(text);
    let Some(trainer) = trainers.iter().find(|trainer| trainer.name == name) else {
        let known: Vec<&str> = trainers.iter().map(|trainer| trainer.name).collect();
        return Err(spec.unknown_trainer(name, &known));
    };
    let known = [&SECTIONS, trainer.sections].concat();
    spec.refuse_other_sections(&known, trainer.sections)?;
    Ok((spec, trainer))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Prose {
        heads: usize,
    }

    fn check(spec: &Spec<'_>) -> Result<(), JobError> {
        let prose: Prose = spec.section("prose")?;
        match prose.heads {
            0 => Err(spec.mistake("prose", "heads", "heads must be above 0", "write a number such as 4")),
            _ => Ok(()),
        }
    }

    fn load(_: &Spec<'_>, _: Plan) -> Result<Box<dyn Train>, JobError> {
        unreachable!("nothing is loaded here")
    }

    const OWN: Trainers = Trainers::Own(&[Trainer { name: "prose", sections: &["prose"], check, load }]);

    #[test]
    fn what_is_nobodys_is_refused_with_its_line_and_the_mend() {
        let good = "name = \"p\"\ntrainer = \"prose\"\nprogram = \"own\"\n[train]\nsteps = 1\n[prose]\nheads = 4\n";
        let said = |text: &str, name: &str| OWN.check(text, name, 8).expect_err("refused").to_string();
        OWN.check(good, "prose", 8).expect("a good spec");
        assert_eq!(said(good, "domains"), "line 2: unknown trainer \"domains\" (write one of prose)");
        assert_eq!(
            said(&good.replace("= 4", "= 0"), "prose"),
            "line 7: [prose] heads must be above 0 (write a number such as 4)"
        );
        assert_eq!(
            said(&good.replace("= 4", "= 'x'"), "prose"),
            "line 7: invalid type: string \"x\" (write a whole number)"
        );
        assert_eq!(said(&good.replace("heads = 4", ""), "prose"), "line 6: missing field `heads` (add the key)");
        assert_eq!(
            said(&good.replace("[prose]", "[pros]"), "prose"),
            "line 6: unknown section [pros] (this trainer has [prose] besides [data], [model], [optimizer] and [schedule])"
        );
        assert_eq!(said(&good.replace("[prose]\nheads = 4\n", ""), "prose"), "line 1: no [prose] section (add it)");
    }
}
