//! The gateway's routes, read from its source: a router does not list them, and a list by hand would forget the next one.

use std::collections::BTreeSet;
use std::path::Path;

/// Every path that is given to a router.
pub fn routes() -> BTreeSet<String> {
    let mut routes = BTreeSet::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut routes);
    routes
}

fn read(dir: &Path, routes: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read(&path, routes);
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for other in [".route_service(", ".nest(", ".nest_service("] {
            assert!(
                !text.contains(other),
                "{}: teach this list about {other}",
                path.display()
            );
        }
        for after in text.split(".route(").skip(1) {
            let literal = after
                .trim_start()
                .strip_prefix('"')
                .and_then(|rest| rest.split('"').next());
            let literal = literal.unwrap_or_else(|| panic!("{}: a route's path must be a literal", path.display()));
            routes.insert(literal.to_owned());
        }
    }
}
