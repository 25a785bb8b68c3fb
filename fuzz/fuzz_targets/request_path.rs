//! Any authority and any path: nothing panics, and whatever is routed to a
//! project was spelled in the one way there is.
#![no_main]

use cocalc_http::path::{Served, Target, What};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &str)| {
    let (authority, path) = input;
    let Ok(served) = Served::new().domain("alpha.localhost:7810").and_then(|s| s.base_path("/base")) else {
        panic!("constants are refused");
    };
    let Some(origin) = served.origin(authority) else { return };
    let Some(Target::Project(place)) = served.target(origin, path) else { return };
    let id = place.project.to_string();
    assert!(place.mount.is_empty() || place.mount == format!("/base/{id}"));
    let rest = path.strip_prefix(place.mount).expect("the mount begins the path");
    match place.what {
        What::Bare => assert_eq!(rest, ""),
        What::Root => assert_eq!(rest, "/"),
        What::Session => assert_eq!(rest, "/.cocalc/session"),
        What::Proxy { port, prefix, rest } => {
            assert_eq!(format!("{}/proxy/{port}", place.mount), prefix);
            assert_eq!(format!("{prefix}{rest}"), path);
            assert!(rest.is_empty() || rest.starts_with('/'));
        }
        What::Files { rest: tail } => assert_eq!(format!("/files{tail}"), rest),
        What::Bus { rest: tail } => assert_eq!(format!("/conat{tail}"), rest),
        // On a port's own origin the whole path is the app's.
        What::Port { port } if origin != cocalc_http::path::Origin::Port(place.project, port) => {
            let tail = rest.strip_prefix(&format!("/port/{port}")).expect("the port is in the path");
            assert!(tail.is_empty() || tail.starts_with('/'));
        }
        _ => {}
    }
});
