//! The gateway's routes, read from its source: a list by hand would forget the next one.

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
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        // A path is given to `Api` as a literal, or as a constant.
        for method in [".get(", ".post(", ".delete(", ": &str ="] {
            for after in text.split(method).skip(1) {
                let literal = after
                    .trim_start()
                    .strip_prefix('"')
                    .and_then(|rest| rest.split('"').next());
                routes.extend(literal.filter(|path| path.starts_with('/')).map(str::to_owned));
            }
        }
        let forbidden = [".route(", ".route_service(", ".nest(", ".nest_service("];
        let only_there = path.ends_with("openapi.rs");
        assert!(
            only_there || !forbidden.iter().any(|other| text.contains(other)),
            "{}: routes are registered with `Api`, which describes them",
            path.display()
        );
    }
}
