//! The project page's own files, which are in the program.

use std::sync::LazyLock;

use sha1::{Digest, Sha1};

use crate::problem::escape;

const PAGE: &str = include_str!("../../assets/page/page.html");

/// The script that the project page has in common with a page around it: plain
/// JavaScript for the beginning of a script, which defines `byId`, `made`, `buttons`,
/// `failure` (a problem's text, with what helps) and `succeeded`.
pub const SHARED_SCRIPT: &str = include_str!("../../assets/page/shared.js");
/// The style that they have in common.
pub const SHARED_STYLE: &str = include_str!("../../assets/page/shared.css");

/// A file that the page uses.
#[derive(Debug)]
pub(crate) struct Asset {
    pub(crate) kind: &'static str,
    pub(crate) bytes: &'static [u8],
}

const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";

/// By name.
pub(crate) fn asset(name: &str) -> Option<Asset> {
    let (kind, bytes): (_, &[u8]) = match name {
        "shared.css" => (STYLE, SHARED_STYLE.as_bytes()),
        "shared.js" => (SCRIPT, SHARED_SCRIPT.as_bytes()),
        "page.css" => (STYLE, include_bytes!("../../assets/page/page.css")),
        "page.js" => (SCRIPT, include_bytes!("../../assets/page/page.js")),
        "files.js" => (SCRIPT, include_bytes!("../../assets/page/files.js")),
        "terminal.js" => (SCRIPT, include_bytes!("../../assets/page/terminal.js")),
        "xterm.css" => (STYLE, include_bytes!("../../assets/vendor/xterm.css")),
        "xterm.js" => (SCRIPT, include_bytes!("../../assets/vendor/xterm.js")),
        "addon-fit.js" => (SCRIPT, include_bytes!("../../assets/vendor/addon-fit.js")),
        "xterm.LICENSE" => (TEXT, include_bytes!("../../assets/vendor/xterm.LICENSE")),
        "addon-fit.LICENSE" => (TEXT, include_bytes!("../../assets/vendor/addon-fit.LICENSE")),
        _ => return None,
    };
    Some(Asset { kind, bytes })
}

/// Changes with any of the files, so that browsers may keep what they have.
pub(crate) static VERSION: LazyLock<String> = LazyLock::new(|| {
    let mut hash = Sha1::new();
    hash.update(PAGE);
    for name in [
        "shared.css",
        "shared.js",
        "page.css",
        "page.js",
        "files.js",
        "terminal.js",
        "xterm.css",
        "xterm.js",
        "addon-fit.js",
    ] {
        hash.update(asset(name).map_or(&[][..], |asset| asset.bytes));
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
});

/// What the page is told in its own text.
#[derive(Debug)]
pub(crate) struct Told<'a> {
    pub(crate) project: &'a str,
    /// The origin that may embed it, with which alone it speaks.
    pub(crate) embedder: Option<&'a str>,
    /// Whether its user may open terminals.
    pub(crate) terminals: bool,
    /// In how many seconds it is stopped for being idle.
    pub(crate) stops_in: Option<u64>,
}

/// The page.
pub(crate) fn page(told: &Told<'_>) -> String {
    let warning = told.stops_in.map_or_else(String::new, |secs| {
        format!("It is idle, and will be stopped in {} min unless it is used.", secs.div_ceil(60))
    });
    PAGE.replace("{{version}}", &VERSION)
        .replace("{{project}}", &escape(told.project))
        .replace("{{embedder}}", &escape(told.embedder.unwrap_or_default()))
        .replace("{{terminals}}", if told.terminals { "yes" } else { "no" })
        .replace("{{idle}}", &escape(&warning))
        .replace("{{idle-hidden}}", if warning.is_empty() { "hidden" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_every_file_that_it_names_and_no_script_of_its_own() {
        let told = Told { project: "p", embedder: Some("https://m\"<x>"), terminals: true, stops_in: None };
        let page = page(&told);
        assert!(!page.contains("{{") && page.contains("https://m&quot;&lt;x&gt;"), "{page}");
        let mut named = 0;
        for reference in page.split(".cocalc/assets/").skip(1) {
            let name = reference.split(['?', '"']).next().unwrap();
            assert!(asset(name).is_some(), "{name}");
            named += 1;
        }
        assert!(named >= 7, "{named}");
        let mut ids: Vec<_> = page.split(" id=\"").skip(1).map(|rest| rest.split('"').next()).collect();
        let all = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), all, "an id is there twice");
        // A policy without inline scripts would stop them.
        assert!(!page.contains("<script>") && !page.contains("javascript:"));
        assert!(!page.split_whitespace().any(|word| word.starts_with("on") && word.contains("=\"")));
    }
}
