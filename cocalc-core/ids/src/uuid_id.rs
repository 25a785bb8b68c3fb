//! Identifiers that are UUIDs in their canonical, lower-case, hyphenated form.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

use crate::ParseIdError;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub struct $name(Uuid);

        impl $name {
            /// Makes an id from 16 bytes that the caller took from a secure
            /// random source, or derived; sets the version and variant bits.
            pub fn from_random_bytes(bytes: [u8; 16]) -> Self {
                Self(uuid::Builder::from_random_bytes(bytes).into_uuid())
            }

            /// Makes a new random (version 4) id from the system's source.
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// Makes an id from the 16 bytes of an existing UUID, unchanged.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }

            /// The 16 bytes of the UUID.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(s: &str) -> Result<Self, ParseIdError> {
                match Uuid::try_parse(s) {
                    // One spelling only: ids become path names and cache keys.
                    Ok(id) if id.hyphenated().encode_lower(&mut [0; 36]) == s => Ok(Self(id)),
                    _ => Err(ParseIdError { kind: $kind, expected: "36 characters of a lower-case UUID" }),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.0.hyphenated().encode_lower(&mut [0; 36]))
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

uuid_id!(
    /// Identifies a project for its whole life, across moves between hosts.
    ProjectId, "project id"
);
uuid_id!(
    /// Identifies a person's or a service's account at the master.
    AccountId, "account id"
);
uuid_id!(
    /// Identifies a project-host, for as long as its identity key exists.
    HostId, "host id"
);
uuid_id!(
    /// Identifies an enrolled proxy.
    ProxyId, "proxy id"
);
uuid_id!(
    /// Identifies one move of one project; the fence of that project.
    MoveId, "move id"
);
uuid_id!(
    /// Identifies a long-running operation at the master.
    OperationId, "operation id"
);
uuid_id!(
    /// Identifies one start of a daemon process; routes and operations bind to it.
    SessionId, "session id"
);
uuid_id!(
    /// Identifies an SSH or API key in an account's list.
    KeyId, "key id"
);
uuid_id!(
    /// Identifies the receipt of one revocation at the master.
    ReceiptId, "receipt id"
);
uuid_id!(
    /// The UUID that a file system gave a subvolume or snapshot.
    VolumeUuid, "volume uuid"
);

impl ProjectId {
    /// Parses what SSH users may type: the UUID, `project-<uuid>`, or the 32
    /// hexadecimal digits of the UUID without hyphens. Lower case only.
    ///
    /// # Errors
    ///
    /// Any other text is refused, without saying which form was nearest.
    pub fn from_ssh_user(user: &str) -> Result<Self, ParseIdError> {
        let refused = ParseIdError {
            kind: "project name",
            expected: "<project id>, project-<project id>, or its 32 digits",
        };
        let canonical = user.strip_prefix("project-").unwrap_or(user);
        if let Ok(id) = canonical.parse() {
            return Ok(id);
        }
        if user.len() != 32 || !user.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(refused);
        }
        Uuid::try_parse(user).map(Self).map_err(|_| refused)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn refuses_every_other_spelling() {
        let id = "0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b";
        assert!(id.parse::<ProjectId>().is_ok());
        for bad in [
            "",
            "0a7b1c9e4f524a8e9d3b1c2d3e4f5a6b",
            "{0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b}",
            "urn:uuid:0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b",
            "0A7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b",
            "0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b ",
            "../../../../../../../../../../etc/passw",
        ] {
            assert!(bad.parse::<ProjectId>().is_err(), "{bad:?}");
            assert!(serde_json::from_value::<ProjectId>(bad.into()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ssh_users_have_three_forms() {
        let id: ProjectId = "0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b".parse().unwrap();
        for user in [
            "0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b",
            "project-0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b",
            "0a7b1c9e4f524a8e9d3b1c2d3e4f5a6b",
        ] {
            assert_eq!(ProjectId::from_ssh_user(user), Ok(id));
        }
        for user in ["project-0a7b1c9e4f524a8e9d3b1c2d3e4f5a6b", "root", "0A7B1C9E4F524A8E9D3B1C2D3E4F5A6B"] {
            assert!(ProjectId::from_ssh_user(user).is_err(), "{user}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_accepts_only_canonical(text in ".{0,64}") {
            if let Ok(id) = text.parse::<ProjectId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }

        #[test]
        fn display_and_parse_are_inverse(bytes in any::<[u8; 16]>()) {
            let id = ProjectId::from_bytes(bytes);
            prop_assert_eq!(id.to_string().parse(), Ok(id));
            let json = serde_json::to_string(&id).unwrap();
            prop_assert_eq!(serde_json::from_str::<ProjectId>(&json).unwrap(), id);
        }
    }
}
