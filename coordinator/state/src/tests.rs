//! The machine on tables in memory. What it does on a disk that fails is tested in `baton-raftstore`.

use crate::{Applied, MemoryTables, Refused, apply, view};
use baton_proto::cluster::Register;
use baton_proto::state::{Command, RegisterWorker, SettleUsage, UsageRecord, command};
use prost::Message as _;

fn register(id: &str) -> Vec<u8> {
    let worker = Some(Register {
        worker_id: id.into(),
        ..Register::default()
    });
    encode(command::Kind::RegisterWorker(RegisterWorker { worker, at_unix_ms: 7 }))
}

fn settle(id: &str, completion_tokens: u32) -> Vec<u8> {
    let record = Some(UsageRecord {
        request_id: id.into(),
        completion_tokens,
        ..UsageRecord::default()
    });
    encode(command::Kind::SettleUsage(SettleUsage { record }))
}

fn encode(kind: command::Kind) -> Vec<u8> {
    Command {
        kind: Some(kind),
        ..Command::default()
    }
    .encode_to_vec()
}

#[test]
fn a_refused_command_changes_nothing_but_the_hash() {
    let mut tables = MemoryTables::default();
    assert_eq!(
        apply(&mut tables, 1, &register("w")),
        Ok(Ok(Applied::Registered { epoch: 1 }))
    );
    assert_eq!(
        apply(&mut tables, 2, &settle("r", 1)),
        Ok(Ok(Applied::Settled { sequence: 1 }))
    );
    let mut before = tables.clone();
    for refused in [settle("r", 2), settle("", 1), register(""), vec![0xff; 9], Vec::new()] {
        let hash = view::hash(&tables).unwrap();
        assert!(apply(&mut tables, 3, &refused).unwrap().is_err());
        assert_ne!(view::hash(&tables).unwrap(), hash);
    }
    let conflict = apply(&mut tables, 4, &settle("r", 2)).unwrap();
    assert!(matches!(conflict, Err(Refused::UsageConflict { sequence: 1, .. })));
    before.0.remove(crate::keys::HASH);
    tables.0.remove(crate::keys::HASH);
    assert_eq!(before, tables);
}

#[test]
fn keys_keep_the_order_of_numbers() {
    let mut tables = MemoryTables::default();
    for i in 0..300 {
        apply(&mut tables, i, &settle(&format!("r{i}"), 1)).unwrap().unwrap();
    }
    assert_eq!(view::settled(&tables).unwrap(), 300);
    let page = view::usage_after(&tables, 254, 3).unwrap();
    assert_eq!(
        page.iter().map(|settled| settled.sequence).collect::<Vec<_>>(),
        [255, 256, 257]
    );
}
