//! Bugs that the simulation plants to show that it finds them. `planted!(Name)` is `false` wherever tests are not built, so
//! nothing of this is in a release: the names, the switch and the code they guard are compiled away.

#[cfg(not(test))]
macro_rules! planted {
    ($bug:ident) => {
        false
    };
}

#[cfg(test)]
macro_rules! planted {
    ($bug:ident) => {
        crate::planted::is(crate::planted::Bug::$bug)
    };
}

#[cfg(test)]
mod machine;
#[cfg(test)]
mod switch;

#[cfg(test)]
pub(crate) use machine::apply;
#[cfg(test)]
pub(crate) use switch::{Bug, Witnessed, is, note_members, plant, take_witnessed, witness};
