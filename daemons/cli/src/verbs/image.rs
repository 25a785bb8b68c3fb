//! `cocalc image …`

use serde_json::{Value, json};

use super::{project::text, settle, size};
use crate::{
    api::Api,
    args::{Image, Output},
    failure::Failure,
    output::{items, print},
};

const COLUMNS: [&str; 5] = ["digest", "names", "size", "projects", "hosts"];
const REMOVED: [&str; 4] = ["host_id", "digest", "names", "size"];

pub(super) fn run(api: &Api, output: Output, verb: Image) -> Result<(), Failure> {
    match verb {
        Image::List => {
            let answer = api.get("/images")?;
            match output {
                Output::Json => print(output, &answer, &[]),
                Output::Table => print(output, &readable(items(&answer, "images")), &COLUMNS),
            }
        }
        Image::Pull { reference, name, host } => {
            begin(api, output, "/images/pull", json!({ "reference": reference }), name, host)?;
        }
        Image::Build { recipe, name, host } => {
            let text = std::fs::read_to_string(&recipe)
                .map_err(|error| Failure::failed(format!("{}: {error}", recipe.display())))?;
            begin(api, output, "/images/build", json!({ "recipe": text }), name, host)?;
        }
        Image::Import { file, name, host } => {
            begin(api, output, "/images/import", json!({ "file": file }), name, host)?;
        }
        Image::Fetch { image, host } => {
            begin(api, output, &format!("/images/{image}/fetch"), json!({}), None, Some(host))?;
        }
        Image::Pin { image, host } => note(api, output, &image, json!({ "pinned": true }), host)?,
        Image::Unpin { image, host } => note(api, output, &image, json!({ "pinned": false }), host)?,
        Image::Name { image, name } => note(api, output, &image, json!({ "name": name }), None)?,
        Image::Prune { unused_days, dry_run, host } => {
            let mut body = json!({ "dry_run": dry_run });
            if let Some(days) = unused_days {
                body["unused_days"] = days.into();
            }
            if let Some(host) = host {
                body["host"] = host.into();
            }
            let answer = api.post("/images/prune", &body)?;
            match output {
                Output::Json => print(output, &answer, &[]),
                Output::Table => print(output, &readable(items(&answer, "removed")), &REMOVED),
            }
        }
    }
    Ok(())
}

/// Begins work on an image, waits for it, and shows what came of it.
fn begin(
    api: &Api,
    output: Output,
    path: &str,
    mut body: Value,
    name: Option<String>,
    host: Option<String>,
) -> Result<(), Failure> {
    if let Some(name) = name {
        body["name"] = name.into();
    }
    if let Some(host) = host {
        body["host"] = host.into();
    }
    let answer = api.post(path, &body)?;
    let done = settle(api, &answer)?;
    match output {
        Output::Json => print(output, &done, &[]),
        Output::Table => println!("{}", text(&done["progress"], "digest")?),
    }
    Ok(())
}

fn note(
    api: &Api,
    output: Output,
    image: &str,
    mut body: Value,
    host: Option<String>,
) -> Result<(), Failure> {
    if let Some(host) = host {
        body["host"] = host.into();
    }
    let answer = api.patch(&format!("/images/{image}"), &body)?;
    if output == Output::Json {
        print(output, &answer, &[]);
    }
    Ok(())
}

/// The same for people: lists as words, bytes in units.
fn readable(images: &Value) -> Value {
    let mut images = images.clone();
    for image in images.as_array_mut().into_iter().flatten() {
        image["size"] = image["bytes"].as_u64().map_or_else(String::new, size).into();
        let words = |value: &Value| -> Vec<String> {
            value
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|word| word.as_str().map(str::to_owned))
                .collect()
        };
        image["names"] = words(&image["names"]).join(" ").into();
        let hosts = image["hosts"].as_array().map(Vec::len);
        if let Some(hosts) = hosts {
            let pinned = image["hosts"].as_array().into_iter().flatten();
            let pinned = pinned.filter(|host| host["pinned"] == true).count();
            let note = if pinned > 0 { format!(" (pinned on {pinned})") } else { String::new() };
            image["hosts"] = format!("{hosts}{note}").into();
        }
    }
    images
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_shown_in_words() {
        let shown = readable(&json!([{
            "names": ["a", "b"], "bytes": 1536, "hosts": [{ "pinned": true }, { "pinned": false }],
        }]));
        assert_eq!(shown[0]["names"], "a b");
        assert_eq!(shown[0]["size"], "1.5 KiB");
        assert_eq!(shown[0]["hosts"], "2 (pinned on 1)");
    }
}
