//! The models that the cluster offers, by the name clients send.

use crate::audit;
use crate::bounds::{self, SETTINGS_BYTES_MAX};
use crate::keys;
use crate::machine::{Handled, Machine};
use crate::outcome::{Applied, Refused};
use crate::tables::TablesMut as _;
use crate::view;
use baton_proto::state::{PutDeployment, RemoveDeployment};

pub(crate) fn put(machine: &mut Machine<'_>, command: PutDeployment) -> Handled {
    let Some(deployment) = command.deployment else {
        return Err(Refused::invalid("a deployment is missing").into());
    };
    bounds::name("the model's name", &deployment.model)?;
    bounds::text("the revision", &deployment.revision)?;
    if deployment.settings.len() > SETTINGS_BYTES_MAX {
        return Err(Refused::invalid(format!("settings are at most {SETTINGS_BYTES_MAX} bytes")).into());
    }
    let known = view::deployment(machine, &deployment.model)?;
    let changed = known.as_ref() != Some(&deployment);
    if changed {
        machine.put_message(&keys::named(keys::DEPLOYMENTS, &deployment.model), &deployment)?;
        let action = if known.is_some() {
            "put_deployment"
        } else {
            "create_deployment"
        };
        audit::write(machine, action, &deployment.model)?;
    }
    Ok(Applied::Stands { changed })
}

pub(crate) fn remove(machine: &mut Machine<'_>, command: &RemoveDeployment) -> Handled {
    let removed = view::deployment(machine, &command.model)?.is_some();
    if removed {
        machine.delete(&keys::named(keys::DEPLOYMENTS, &command.model))?;
        audit::write(machine, "remove_deployment", &command.model)?;
    }
    Ok(Applied::Removed { removed })
}
