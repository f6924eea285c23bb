//! Power loss and failing disks at every operation: what was answered is there, and nothing else is wrong.

use super::disk::Disk;
use super::{lone_node, register, remove, run, settle};
use crate::database::Store;
use crate::{Applied, RaftStoreError, queries};
use baton_proto::state::Command;
use std::io::ErrorKind;

/// Small enough to crash at each of its operations, large enough to compact the log.
fn script() -> Vec<Command> {
    let mut commands = Vec::new();
    for i in 0..10 {
        commands.push(settle(&format!("r{i}"), i));
        if i % 3 == 0 {
            commands.push(register(&format!("w{}", i % 2)));
        }
        if i % 5 == 4 {
            commands.push(remove("w0", u64::from(i)));
        }
    }
    commands
}

/// Runs the script from `from`, and returns the answers up to the first failure of the store.
fn play(disk: &Disk, life: u64, from: usize) -> (Vec<Applied>, Option<RaftStoreError>) {
    let mut answers = Vec::new();
    let mut attempt = || -> Result<(), RaftStoreError> {
        let store = Store::on(disk.clone())?;
        let mut node = lone_node(&store, life, 4)?;
        for command in &script()[from..] {
            answers.push(run(&mut node, command)?);
        }
        Ok(())
    };
    let error = attempt().err();
    (answers, error)
}

#[test]
fn every_answer_survives_a_crash_at_every_operation() {
    let whole = Disk::default();
    let (expected, error) = play(&whole, 0, 0);
    assert!(error.is_none(), "{error:?}");
    assert_eq!(expected.len(), script().len());
    let operations = whole.operations();
    assert!(operations > 50);
    for at in 0..operations {
        let disk = Disk::default();
        disk.fail_at(at, ErrorKind::Other);
        let (answers, _) = play(&disk, 1, 0);
        assert_eq!(answers[..], expected[..answers.len()], "crash at {at}");
        for choice in 0..2 {
            let image = disk.crash_image(choice * 7919 + at);
            let store = match Store::on(Disk::with(image)) {
                Ok(store) => store,
                // Nothing was ever answered by a file whose creation was cut.
                Err(_) if answers.is_empty() => continue,
                Err(error) => panic!("crash at {at}: {error}"),
            };
            let mut node = lone_node(&store, 2, 4).unwrap_or_else(|error| panic!("crash at {at}: {error}"));
            // Usage that was answered is there; at most the one command under way is there besides.
            let position = queries::position(&store).unwrap();
            let settled = answers
                .iter()
                .filter(|answer| matches!(answer, Applied::Settled { .. }))
                .count() as u64;
            assert!(
                position.settled == settled || position.settled == settled + 1,
                "crash at {at}"
            );
            // Answered settlements repeat their answer.
            for (command, answer) in script().iter().zip(&answers) {
                if let Applied::Settled { .. } = answer {
                    assert_eq!(run(&mut node, command).unwrap(), *answer, "crash at {at}");
                }
            }
            // Epochs go on above every one that was answered.
            let highest = answers.iter().filter_map(|answer| match answer {
                Applied::Registered { epoch } => Some(*epoch),
                _ => None,
            });
            let highest = highest.max().unwrap_or(0);
            match run(&mut node, &register("w0")).unwrap() {
                Applied::Registered { epoch } => assert!(epoch > highest, "crash at {at}"),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn a_full_disk_is_said_so_and_loses_nothing() {
    let disk = Disk::default();
    let whole = Disk::default();
    play(&whole, 0, 0);
    disk.fail_at(whole.operations() / 2, ErrorKind::StorageFull);
    let (answers, error) = play(&disk, 1, 0);
    assert!(matches!(error, Some(RaftStoreError::DiskFull)), "{error:?}");
    // Space was freed, the process restarted: the rest goes on.
    let again = Disk::with(disk.crash_image(0));
    let (_, error) = play(&again, 2, answers.len());
    assert!(error.is_none(), "{error:?}");
}
