//! A browser, as far as log-ins need one: cookies, redirects, and forms.

use std::collections::BTreeMap;

use crate::provider::LIMIT;

/// A browser with its cookies.
#[derive(Clone, Default)]
pub(crate) struct Browser {
    cookies: BTreeMap<(String, String), String>,
}

/// What a server answered.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) url: String,
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) text: String,
}

impl Shown {
    /// Where it leads, in full.
    pub(crate) fn location(&self) -> Option<String> {
        let location = self.headers.get("location")?.to_str().unwrap();
        match location.starts_with('/') {
            true => Some(format!("{}{location}", origin(&self.url))),
            false => Some(location.to_owned()),
        }
    }

    /// A parameter of where it leads.
    pub(crate) fn parameter(&self, name: &str) -> Option<String> {
        parameter(&self.location()?, name)
    }

    /// A hidden field of the page's form.
    pub(crate) fn hidden(&self, name: &str) -> Option<String> {
        let (_, rest) = self.text.split_once(&format!("name=\"{name}\" value=\""))?;
        Some(rest.split_once('"')?.0.to_owned())
    }

    /// An attribute of the page.
    pub(crate) fn data(&self, name: &str) -> Option<String> {
        let (_, rest) = self.text.split_once(&format!("data-{name}=\""))?;
        Some(rest.split_once('"')?.0.to_owned())
    }
}

/// A parameter of an address, as it is written there.
pub(crate) fn parameter(url: &str, name: &str) -> Option<String> {
    let query = url.split_once('?')?.1;
    let mut found = query.split('&').filter_map(|pair| pair.split_once('='));
    found.find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
}

fn origin(url: &str) -> &str {
    let end = url.match_indices('/').nth(2).map_or(url.len(), |(at, _)| at);
    &url[..end]
}

impl Browser {
    /// One request, without following where it leads.
    pub(crate) fn get(&mut self, url: &str) -> Shown {
        self.send("GET", url, String::new())
    }

    /// Sends a form.
    pub(crate) fn post(&mut self, url: &str, form: &str) -> Shown {
        self.send("POST", url, form.to_owned())
    }

    fn send(&mut self, method: &str, url: &str, form: String) -> Shown {
        let host = origin(url).to_owned();
        let mine = self.cookies.iter().filter(|((of, _), _)| *of == host);
        let cookies: Vec<_> = mine.map(|((_, name), value)| format!("{name}={value}")).collect();
        let mut request = http::Request::builder().method(method).uri(url);
        if !cookies.is_empty() {
            request = request.header("cookie", cookies.join("; "));
        }
        if !form.is_empty() {
            request = request.header("content-type", "application/x-www-form-urlencoded");
        }
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_global(Some(LIMIT))
            .build();
        let mut response = ureq::Agent::from(config).run(request.body(form).unwrap()).unwrap();
        for cookie in response.headers().get_all("set-cookie") {
            let (name, rest) = cookie.to_str().unwrap().split_once('=').unwrap();
            let value = rest.split(';').next().unwrap().to_owned();
            let key = (host.clone(), name.to_owned());
            match value.is_empty() {
                true => self.cookies.remove(&key),
                false => self.cookies.insert(key, value),
            };
        }
        let text = response.body_mut().read_to_string().unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Shown { url: url.to_owned(), status, headers, text }
    }

    /// Goes where `url` leads until `there`, and logs in as `name` where the
    /// provider asks.
    pub(crate) fn until(&mut self, url: &str, name: &str, there: impl Fn(&str) -> bool) -> String {
        let mut url = url.to_owned();
        for _ in 0..20 {
            if there(&url) {
                return url;
            }
            let shown = match url.contains("/interaction/") {
                true => {
                    let form = self.get(&url);
                    let prompt = form.text.split_once("name=\"prompt\" value=\"").expect("a form").1;
                    let prompt = prompt.split_once('"').unwrap().0;
                    let name = name.replace('@', "%40");
                    self.send("POST", &url, format!("prompt={prompt}&login={name}&password=any"))
                }
                false => self.get(&url),
            };
            // A person is asked before a program gets anything.
            let shown = match shown.hidden("word") {
                Some(word) if shown.status == 200 => {
                    let agree = shown.url.replace("/callback?", "/agree?");
                    let agree = agree.split('?').next().unwrap().to_owned();
                    self.send("POST", &agree, format!("word={word}"))
                }
                _ => shown,
            };
            url = shown.location().unwrap_or_else(|| panic!("it leads nowhere: {shown:?}"));
        }
        panic!("it does not end: {url}");
    }

    /// A whole log-in: the address with which it comes back from the provider.
    pub(crate) fn back(&mut self, start: &str, name: &str) -> String {
        self.until(start, name, |url| url.contains("/callback?"))
    }
}
