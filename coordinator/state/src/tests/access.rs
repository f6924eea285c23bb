//! Projects, keys, and the audit log.

use super::{Bench, api_key, project, put_key};
use crate::view::{self, Access};
use crate::{Applied, Refused};
use baton_proto::state::{ApiKey, Limits, Project, PutProject, RevokeKey, Scope, command::Kind};

fn access(bench: &Bench, secret: u8) -> Access {
    view::access(&bench.tables, &[secret; 32], bench.now_ms).unwrap()
}

#[test]
fn a_key_is_valid_until_something_ends_it() {
    let mut bench = Bench::new();
    let expires_unix_ms = bench.now_ms + 1000;
    let key = ApiKey {
        expires_unix_ms,
        ..api_key("k", 1)
    };
    assert_eq!(access(&bench, 1), Access::Unknown);
    for changed in [true, false] {
        assert_eq!(bench.run(put_key(key.clone())), Ok(Applied::Stands { changed }));
    }
    assert!(matches!(access(&bench, 1), Access::Granted { key, project }
        if key.created_unix_ms == bench.now_ms && project.id == "p"));
    // Its project is archived, and is not.
    for archived in [true, false] {
        let archive = Project {
            id: "p".into(),
            organization_id: "o".into(),
            archived,
            ..Project::default()
        };
        bench
            .run(Kind::PutProject(PutProject { project: Some(archive) }))
            .unwrap();
        assert_eq!(access(&bench, 1) == Access::Archived, archived);
    }
    // Its time is over by the caller's clock, then by the group's.
    assert_eq!(
        view::access(&bench.tables, &[1; 32], expires_unix_ms).unwrap(),
        Access::Expired
    );
    bench.tick(1000);
    assert_eq!(view::access(&bench.tables, &[1; 32], 0).unwrap(), Access::Expired);
    // What it may do can change; when it was made stays.
    let longer = ApiKey {
        expires_unix_ms: 0,
        limits: Some(Limits {
            requests_per_min: 5,
            tokens_per_min: 0,
        }),
        ..key.clone()
    };
    bench.run(put_key(longer.clone())).unwrap();
    assert!(matches!(access(&bench, 1), Access::Granted { key, .. } if key.created_unix_ms + 1000 == bench.now_ms));
    let revoke = || Kind::RevokeKey(RevokeKey { id: "k".into() });
    for changed in [true, false] {
        assert_eq!(bench.run(revoke()), Ok(Applied::Stands { changed }));
    }
    assert_eq!(access(&bench, 1), Access::Revoked);
    assert!(matches!(bench.refuses(put_key(longer)), Refused::KeyRevoked { .. }));
    assert!(matches!(bench.refuses(put_key(api_key("k2", 1))), Refused::KeyHashTaken { id } if id == "k"));
}

#[test]
fn what_a_key_is_stays() {
    let mut bench = Bench::new();
    bench.run(project("q")).unwrap();
    bench.run(put_key(api_key("k", 1))).unwrap();
    assert!(matches!(
        bench.refuses(put_key(api_key("k", 2))),
        Refused::Fixed { field: "the hash", .. }
    ));
    let moved = ApiKey {
        project_id: "q".into(),
        ..api_key("k", 1)
    };
    assert!(matches!(
        bench.refuses(put_key(moved)),
        Refused::Fixed {
            field: "the project",
            ..
        }
    ));
    let foreign = Project {
        id: "p".into(),
        organization_id: "other".into(),
        ..Project::default()
    };
    assert!(matches!(
        bench.refuses(Kind::PutProject(PutProject { project: Some(foreign) })),
        Refused::Fixed { .. }
    ));
    let nowhere = ApiKey {
        project_id: "none".into(),
        ..api_key("k3", 3)
    };
    assert!(matches!(
        bench.refuses(put_key(nowhere)),
        Refused::Unknown { what: "project", .. }
    ));
    for bad in [
        ApiKey {
            sha256: vec![1; 31].into(),
            ..api_key("k3", 3)
        },
        ApiKey {
            scopes: vec![],
            ..api_key("k3", 3)
        },
        ApiKey {
            scopes: vec![Scope::Unspecified.into()],
            ..api_key("k3", 3)
        },
        ApiKey {
            scopes: vec![9],
            ..api_key("k3", 3)
        },
        ApiKey {
            scopes: vec![1, 1],
            ..api_key("k3", 3)
        },
        ApiKey {
            models: vec!["m".into(); 257],
            ..api_key("k3", 3)
        },
        ApiKey {
            revoked: true,
            ..api_key("k3", 3)
        },
        api_key("", 3),
    ] {
        assert!(matches!(bench.refuses(put_key(bad)), Refused::Invalid(_)));
    }
}

#[test]
fn lists_come_in_pages() {
    let mut bench = Bench::new();
    for i in 0..30 {
        bench.run(put_key(api_key(&format!("k{i:02}"), i))).unwrap();
    }
    let mut after = String::new();
    let mut seen = Vec::new();
    loop {
        let page = view::keys_after(&bench.tables, &after, 7).unwrap();
        let Some(last) = page.last() else { break };
        after.clone_from(&last.id);
        seen.extend(page.into_iter().map(|key| key.id));
    }
    assert_eq!(seen, (0..30).map(|i| format!("k{i:02}")).collect::<Vec<_>>());
    // Bench::new made a project and a price.
    let audit = view::audit_after(&bench.tables, 0, 1000).unwrap();
    assert_eq!(
        audit.iter().map(|row| row.sequence).collect::<Vec<_>>(),
        (1..=32).collect::<Vec<_>>()
    );
    assert!(
        audit
            .iter()
            .all(|row| row.actor == "operator" && row.at_unix_ms == bench.now_ms)
    );
}
