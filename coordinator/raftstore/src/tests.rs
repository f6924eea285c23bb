//! Tests of the store: the state machine against a model, crashes at every disk operation, a group over a fake
//! network, and the thread with real files.

mod backup;
mod crash;
mod disk;
mod files;
mod group;
mod members;
mod model;
mod net;
mod reads;
mod restarts;
mod snapshots;
mod tables;

use crate::database::Store;
use crate::node::Node;
use crate::{Applied, RaftStoreConfig, RaftStoreError};
use baton_proto::cluster::Register;
use baton_proto::state::{Command, RegisterWorker, RemoveWorker, SettleUsage, UsageRecord, UsageStatus, command};
use prost::Message as _;

pub(crate) fn register(id: &str) -> Command {
    let worker = Register {
        worker_id: id.into(),
        ..Register::default()
    };
    let kind = command::Kind::RegisterWorker(RegisterWorker {
        worker: Some(worker),
        at_unix_ms: 7,
        nonce: Default::default(),
    });
    Command {
        kind: Some(kind),
        ..Command::default()
    }
}

pub(crate) fn remove(id: &str, epoch: u64) -> Command {
    let kind = command::Kind::RemoveWorker(RemoveWorker {
        worker_id: id.into(),
        epoch,
        reason: "test".into(),
        at_unix_ms: 8,
    });
    Command {
        kind: Some(kind),
        ..Command::default()
    }
}

pub(crate) fn settle(id: &str, tokens: u32) -> Command {
    let record = UsageRecord {
        request_id: id.into(),
        status: UsageStatus::Completed.into(),
        completion_tokens: tokens,
        sampled_tokens: tokens,
        ..UsageRecord::default()
    };
    let kind = command::Kind::SettleUsage(SettleUsage { record: Some(record) });
    Command {
        kind: Some(kind),
        ..Command::default()
    }
}

/// A node of a group of one, leading.
pub(crate) fn lone_node(store: &Store, life: u64, keep: u64) -> Result<Node, RaftStoreError> {
    let config = RaftStoreConfig {
        log_entries_keep: keep,
        ..RaftStoreConfig::single()
    };
    let mut node = Node::open(store.clone(), &config, life, 0)?;
    node.campaign_if_alone()?;
    node.process(&mut |_| {})?;
    Ok(node)
}

/// Proposes one command and drives the node until it is answered.
pub(crate) fn run(node: &mut Node, command: &Command) -> Result<Applied, RaftStoreError> {
    let id = node.propose(command.encode_to_vec())?;
    let progress = node.process(&mut |_| {})?;
    let answer = progress.answers.into_iter().find(|(answered, _)| *answered == id);
    Ok(answer.expect("a group of one answers in the same batch").1?)
}
