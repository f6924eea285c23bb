//! Workers, members, deployments, and what holds for any command.

use super::{Bench, record, settle};
use crate::{Applied, Refused, apply, keys, view};
use baton_proto::cluster::Register;
use baton_proto::state::{
    Deployment, Member, PutDeployment, PutMember, RegisterWorker, RemoveDeployment, RemoveMember, RemoveWorker,
    WitnessWorker, command::Kind,
};

pub(crate) fn register(id: &str) -> Kind {
    register_once(id, &[])
}

pub(crate) fn register_once(id: &str, nonce: &[u8]) -> Kind {
    let worker = Some(Register {
        worker_id: id.into(),
        ..Register::default()
    });
    Kind::RegisterWorker(RegisterWorker {
        worker,
        at_unix_ms: 7,
        nonce: nonce.to_vec().into(),
    })
}

pub(crate) fn witness(epoch: u64, member_id: u64, lost: bool, voters: &[u64]) -> Kind {
    Kind::WitnessWorker(WitnessWorker {
        worker_id: "w".into(),
        epoch,
        member_id,
        lost,
        voters: voters.into(),
    })
}

#[test]
fn most_voters_must_have_lost_a_worker() {
    let mut bench = Bench::new();
    let stays = Ok(Applied::Removed { removed: false });
    let goes = Ok(Applied::Removed { removed: true });
    assert_eq!(bench.run(register("w")), Ok(Applied::Registered { epoch: 1 }));
    assert_eq!(bench.run(witness(1, 1, true, &[1, 2, 3])), stays);
    // The same vote again, and a vote named twice, count once.
    assert_eq!(bench.run(witness(1, 1, true, &[1, 2, 3, 3, 3])), stays);
    // It is seen again.
    assert_eq!(bench.run(witness(1, 1, false, &[1, 2, 3])), stays);
    assert_eq!(bench.run(witness(1, 2, true, &[1, 2, 3])), stays);
    // A new life clears the votes, and votes on the old one are void.
    assert_eq!(bench.run(register("w")), Ok(Applied::Registered { epoch: 2 }));
    assert_eq!(bench.run(witness(1, 3, true, &[1, 2, 3])), stays);
    assert_eq!(bench.run(witness(2, 1, true, &[1, 2, 3])), stays);
    // Member 1 votes no more; of four voters, two are not most.
    assert_eq!(bench.run(witness(2, 2, true, &[2, 3, 4])), stays);
    assert_eq!(view::worker(&bench.tables, "w").unwrap().unwrap().lost_by, [2]);
    assert_eq!(bench.run(witness(2, 3, true, &[2, 3, 4, 5])), stays);
    assert_eq!(bench.run(witness(2, 4, true, &[2, 3, 4, 5])), goes);
    assert_eq!(bench.run(witness(2, 5, true, &[2, 3, 4, 5])), stays);
    assert!(view::workers(&bench.tables).unwrap().is_empty());
    bench.run(register("w")).unwrap();
    for voters in [&[][..], &[2, 3]] {
        assert!(matches!(
            bench.refuses(witness(3, 1, true, voters)),
            Refused::Invalid(_)
        ));
    }
    // A group of one decides alone.
    assert_eq!(bench.run(witness(3, 1, true, &[1])), goes);
}

#[test]
fn an_old_epoch_removes_nothing() {
    let mut bench = Bench::new();
    bench.run(register("w")).unwrap();
    bench.run(register("w")).unwrap();
    for (epoch, removed) in [(1, false), (2, true), (2, false)] {
        let command = Kind::RemoveWorker(RemoveWorker {
            worker_id: "w".into(),
            epoch,
            ..RemoveWorker::default()
        });
        assert_eq!(bench.run(command), Ok(Applied::Removed { removed }));
    }
    assert_eq!(bench.run(register("w")), Ok(Applied::Registered { epoch: 3 }));
}

#[test]
fn members_and_deployments_are_put_once_and_audited() {
    let mut bench = Bench::new();
    let audited = view::audited(&bench.tables).unwrap();
    let member = |id, key: usize| {
        let member = Some(Member {
            id,
            ledger_public_key: vec![1; key].into(),
            ..Member::default()
        });
        Kind::PutMember(PutMember { member })
    };
    let deployment = Deployment {
        model: "m".into(),
        revision: "1".into(),
        ..Deployment::default()
    };
    let deploy = || {
        Kind::PutDeployment(PutDeployment {
            deployment: Some(deployment.clone()),
        })
    };
    let retire = || Kind::RemoveDeployment(RemoveDeployment { model: "m".into() });
    for changed in [true, false] {
        assert_eq!(bench.run(member(1, 32)), Ok(Applied::Stands { changed }));
        assert_eq!(bench.run(deploy()), Ok(Applied::Stands { changed }));
    }
    assert_eq!(
        view::deployments_after(&bench.tables, "", 9).unwrap(),
        std::slice::from_ref(&deployment)
    );
    for removed in [true, false] {
        let command = Kind::RemoveMember(RemoveMember { id: 1 });
        assert_eq!(bench.run(command), Ok(Applied::Removed { removed }));
        assert_eq!(bench.run(retire()), Ok(Applied::Removed { removed }));
    }
    bench.refuses(member(0, 32));
    bench.refuses(member(1, 31));
    let rows = view::audit_after(&bench.tables, audited, 9).unwrap();
    let actions: Vec<_> = rows
        .iter()
        .map(|row| (row.sequence - audited, row.action.as_str()))
        .collect();
    assert_eq!(
        actions,
        [
            (1, "put_member"),
            (2, "create_deployment"),
            (3, "remove_member"),
            (4, "remove_deployment")
        ]
    );
    assert_eq!(rows[1].command, bench.encode(deploy()));
    for id in 1..=64 {
        bench.run(member(id, 0)).unwrap();
    }
    assert!(matches!(bench.refuses(member(65, 0)), Refused::TooMany { max: 64, .. }));
}

#[test]
fn nonsense_changes_nothing_but_the_hash() {
    let mut bench = Bench::new();
    bench.run(settle(record("r", 1))).unwrap();
    let before = bench.contents();
    let mut far = bench.clone();
    far.now_ms = u64::MAX;
    for nonsense in [
        vec![0xff; 9],
        Vec::new(),
        far.encode(register("w")),
        vec![0xf2, 0x7f, 0],
    ] {
        let hash = view::hash(&bench.tables).unwrap();
        assert!(matches!(bench.run_bytes(&nonsense), Err(Refused::Invalid(_))));
        assert_ne!(view::hash(&bench.tables).unwrap(), hash);
        assert_eq!(bench.contents(), before);
    }
    for refused in [settle(record("", 1)), settle(record(&"x".repeat(513), 1)), register("")] {
        assert!(matches!(bench.refuses(refused), Refused::Invalid(_)));
    }
}

#[test]
fn time_never_goes_back() {
    let mut bench = Bench::new();
    let now = bench.now_ms;
    bench.now_ms -= 1000;
    bench.run(register("w")).unwrap();
    assert_eq!(view::time(&bench.tables).unwrap(), now);
    assert_eq!(
        view::worker(&bench.tables, "w").unwrap().unwrap().registered_unix_ms,
        now
    );
}

/// Two members whose tables differ find out, even where every answer is the same.
#[test]
fn the_hash_covers_what_is_written() {
    let mut bench = Bench::new();
    bench.run(settle(record("r", 1))).unwrap();
    let mut other = bench.clone();
    let head = other.tables.0.get_mut(keys::HEAD).unwrap();
    head[8] ^= 1;
    for bench in [&mut bench, &mut other] {
        assert_eq!(bench.run(settle(record("s", 1))), Ok(Applied::Settled { sequence: 2 }));
    }
    assert_ne!(view::hash(&bench.tables).unwrap(), view::hash(&other.tables).unwrap());
}

#[test]
fn a_damaged_table_is_an_error() {
    let mut bench = Bench::new();
    bench.run(settle(record("r", 1))).unwrap();
    for (key, value) in bench.tables.0.clone() {
        for broken in [&value[..value.len() / 2], &[0xff; 70]] {
            let mut tables = bench.tables.clone();
            tables.0.insert(key.clone(), broken.to_vec());
            // Whatever comes of it, nothing panics.
            let _ = apply(&mut tables, 9, &bench.encode(settle(record("s", 1))));
            let _ = apply(&mut tables, 10, &bench.encode(register("w")));
            let _ = view::usage(&tables, "r");
        }
    }
}

#[test]
fn a_registration_that_comes_twice_is_one() {
    let mut bench = Bench::new();
    let Applied::Registered { epoch } = bench.run(register_once("w", &[1; 16])).unwrap() else {
        panic!("registered")
    };
    assert_eq!(
        bench.run(register_once("w", &[1; 16])),
        Ok(Applied::Registered { epoch })
    );
    // Another attempt, and the first once the worker was removed, are new lives.
    let next = Applied::Registered { epoch: epoch + 1 };
    assert_eq!(bench.run(register_once("w", &[2; 16])), Ok(next));
    let remove = Kind::RemoveWorker(RemoveWorker {
        worker_id: "w".into(),
        epoch: epoch + 1,
        ..Default::default()
    });
    bench.run(remove).unwrap();
    let again = Applied::Registered { epoch: epoch + 2 };
    assert_eq!(bench.run(register_once("w", &[2; 16])), Ok(again));
    bench.refuses(register_once("w", &[2; 15]));
}
