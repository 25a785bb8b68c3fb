//! JSON that is passed on as it came.

use std::fmt;

use serde::de::{Deserializer as _, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// What stands for an attachment in the JSON of a packet.
pub const PLACEHOLDER: &str = r#"{"_placeholder":true,"num":0}"#;

/// How many placeholders for the first attachment `json` contains; `None` if
/// it contains one for any other, or a malformed one.
pub(crate) fn placeholders(json: &RawValue) -> Option<usize> {
    let text = json.get();
    // A key can be spelled with escapes. Nearly nothing has either.
    if !text.contains("_placeholder") && !text.contains("\\u") {
        return Some(0);
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let mut found = 0;
    deserializer.deserialize_any(Counter { found: &mut found }).ok()?;
    Some(found)
}

/// Whether `json` is the placeholder of the first attachment, and nothing else.
pub(crate) fn is_placeholder(json: &RawValue) -> bool {
    json.get().starts_with('{')
        && serde_json::from_str::<Placeholder>(json.get())
            .is_ok_and(|placeholder| placeholder.placeholder && placeholder.num == 0)
}

#[derive(serde::Deserialize)]
struct Placeholder {
    #[serde(rename = "_placeholder")]
    placeholder: bool,
    num: u64,
}

/// Appends `value` as a JSON string.
pub(crate) fn push_string(text: &mut String, value: &str) {
    text.push('"');
    for c in value.chars() {
        match c {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            c if u32::from(c) < 0x20 => text.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => text.push(c),
        }
    }
    text.push('"');
}

struct Counter<'a> {
    found: &'a mut usize,
}

impl<'de> Visitor<'de> for Counter<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Counter { found: &mut *self.found })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut marked = false;
        let mut num = None;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "_placeholder" if !marked => {
                    marked = true;
                    map.next_value::<serde::de::IgnoredAny>()?;
                }
                "_placeholder" => return Err(A::Error::custom("two marks")),
                // Any `num` is fine where no mark is.
                "num" => {
                    let value = map.next_value::<Box<RawValue>>()?;
                    num = Some(value.get() == "0" && num.is_none());
                    let within = placeholders(&value);
                    *self.found += within.ok_or_else(|| A::Error::custom("not the first attachment"))?;
                }
                _ => map.next_value_seed(Counter { found: &mut *self.found })?,
            }
        }
        match (marked, num) {
            (false, _) => Ok(()),
            (true, Some(true)) => {
                *self.found += 1;
                Ok(())
            }
            (true, _) => Err(A::Error::custom("not the first attachment")),
        }
    }
}

impl<'de> serde::de::DeserializeSeed<'de> for Counter<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}
