//! Projects, which keys and budgets belong to.

use crate::audit;
use crate::bounds;
use crate::keys;
use crate::machine::{Handled, Machine};
use crate::outcome::{Applied, Refused};
use crate::view;
use baton_proto::state::PutProject;

pub(crate) fn put(machine: &mut Machine<'_>, command: PutProject) -> Handled {
    let Some(project) = command.project else {
        return Err(Refused::invalid("a project is missing").into());
    };
    bounds::name("the project's id", &project.id)?;
    bounds::text("the organisation's id", &project.organization_id)?;
    bounds::text("the project's name", &project.name)?;
    let known = view::project(machine, &project.id)?;
    if let Some(known) = &known
        && known.organization_id != project.organization_id
    {
        return Err(Refused::fixed("project", &project.id, "the organisation").into());
    }
    let changed = known.as_ref() != Some(&project);
    if changed {
        machine.put_message(&keys::named(keys::PROJECTS, &project.id), &project)?;
        let action = if known.is_some() {
            "put_project"
        } else {
            "create_project"
        };
        audit::write(machine, action, &project.id)?;
    }
    Ok(Applied::Stands { changed })
}
