//! What the operator's changes and the coordinators' votes must come to: keys and their limits, the project, and which workers
//! who has lost. Worked out anew from commands and their outcomes.

use super::oracle::{Checked, violation};
use baton_proto::state::{ApiKey, Price, Project, WitnessWorker, command::Kind};
use baton_state::{Applied, MemoryTables, Outcome, view};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Default)]
pub(super) struct Admin {
    keys: BTreeMap<String, ApiKey>,
    project: Option<Project>,
    /// Prices by their ids, as they were put.
    prices: BTreeSet<String>,
    /// Who has lost which worker under its present epoch.
    lost_by: BTreeMap<String, BTreeSet<u64>>,
}

impl Admin {
    pub(super) fn note(&mut self, kind: &Kind, outcome: &Outcome) -> Checked {
        match (kind, outcome) {
            (Kind::PutKey(put), Ok(_)) => {
                let key = put.key.clone().unwrap_or_default();
                if self.keys.get(&key.id).is_some_and(|known| known.revoked) {
                    return violation(format!("key {} is in force again", key.id));
                }
                self.keys.insert(key.id.clone(), key);
            }
            (Kind::RevokeKey(revoke), Ok(_)) => {
                if let Some(key) = self.keys.get_mut(&revoke.id) {
                    key.revoked = true;
                }
            }
            (Kind::PutProject(put), Ok(_)) => self.project.clone_from(&put.project),
            (Kind::PutPrice(_), Ok(Applied::Priced { id })) => drop(self.prices.insert(id.clone())),
            (Kind::RegisterWorker(register), Ok(_)) => {
                let worker = register.worker.clone().unwrap_or_default();
                self.lost_by.remove(&worker.worker_id);
            }
            _ => {}
        }
        Ok(())
    }

    /// A vote on the present epoch of a worker, or not: whether it is to be removed.
    pub(super) fn vote(&mut self, witness: &WitnessWorker, present: bool) -> bool {
        if !present {
            return false;
        }
        let lost_by = self.lost_by.entry(witness.worker_id.clone()).or_default();
        lost_by.retain(|member| witness.voters.contains(member));
        if witness.lost {
            lost_by.insert(witness.member_id);
        } else {
            lost_by.remove(&witness.member_id);
        }
        lost_by.len() * 2 > witness.voters.len()
    }

    pub(super) fn lost_by(&self, worker: &str) -> Vec<u64> {
        self.lost_by.get(worker).into_iter().flatten().copied().collect()
    }

    /// The tables say the same.
    pub(super) fn check(&self, tables: &MemoryTables) -> Checked {
        for (id, key) in &self.keys {
            let found = view::key(tables, id)?.unwrap_or_default();
            if (found.revoked, &found.limits) != (key.revoked, &key.limits) {
                return violation(format!("key {id} is {found:?}, and was made {key:?}"));
            }
        }
        if view::project(tables, "p")? != self.project {
            return violation("the project is another one");
        }
        // With each that is put comes one for batches.
        let (batch, put): (Vec<Price>, Vec<Price>) = view::prices_after(tables, "", 100)?
            .into_iter()
            .partition(|price| price.service_tier == "batch");
        let from = |prices: &[Price]| -> BTreeSet<(String, u64)> {
            let of = |price: &Price| (price.model.clone(), price.effective_from_unix_ms);
            prices.iter().map(of).collect()
        };
        if from(&batch) != from(&put) {
            return violation(format!("prices {put:?}, and of batches {batch:?}"));
        }
        let prices: BTreeSet<String> = put.into_iter().map(|price| price.id).collect();
        if prices != self.prices {
            return violation(format!("prices {prices:?}, and {:?} were put", self.prices));
        }
        let audit = view::audit_after(tables, 0, 1000)?;
        match audit.iter().zip(1..).find(|(row, at)| row.sequence != *at) {
            Some((row, at)) => violation(format!("admin change {at} has number {}", row.sequence)),
            None => Ok(()),
        }
    }
}
