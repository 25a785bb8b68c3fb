use proptest::prelude::*;

use super::*;
use crate::wire::PLACEHOLDER;

fn read(text: &str) -> Result<Option<Packet>, PacketError> {
    Decoder::default().text(text)
}

fn error(text: &str) -> PacketError {
    read(text).expect_err(text)
}

#[test]
fn packets_are_read() {
    assert!(matches!(read("2"), Ok(Some(Packet::Ping))));
    assert!(matches!(read("3"), Ok(Some(Packet::Pong))));
    assert!(matches!(read("40"), Ok(Some(Packet::Connect(None)))));
    assert!(matches!(read("40/,"), Ok(Some(Packet::Connect(None)))));
    assert!(matches!(read(r#"40{"bearer":"x"}"#), Ok(Some(Packet::Connect(Some(_))))));
    assert!(matches!(read("40/admin,{}"), Ok(Some(Packet::ConnectElsewhere(name))) if name == "/admin"));
    assert!(matches!(read("41"), Ok(Some(Packet::Disconnect))));
    let Ok(Some(Packet::Event(event))) = read(r#"4217["subscribe",{"subject":"a"}]"#) else { panic!() };
    assert_eq!((event.name.as_str(), event.ack), ("subscribe", Some(17)));
    assert_eq!(event.argument.unwrap().get(), r#"{"subject":"a"}"#);
    let Ok(Some(Packet::Ack(ack))) = read("430[]") else { panic!() };
    assert_eq!((ack.id, ack.argument.is_none()), (0, true));
}

#[test]
fn an_attachment_follows_directly() {
    let text = format!(r#"451-3["publish",["a","id",0,1,0,{PLACEHOLDER}]]"#);
    let mut decoder = Decoder::default();
    assert!(matches!(decoder.text(&text), Ok(None)));
    let Ok(Packet::Event(event)) = decoder.binary(Bytes::from_static(b"blob")) else { panic!() };
    assert_eq!(event.blob.as_deref(), Some(&b"blob"[..]));
    assert_eq!(decoder.binary(Bytes::new()).unwrap_err(), PacketError::Unannounced);

    let mut decoder = Decoder::default();
    assert!(matches!(decoder.text(&text), Ok(None)));
    assert_eq!(decoder.text("2").unwrap_err(), PacketError::Interleaved);
}

#[test]
fn malformed_packets_are_refused() {
    for text in ["", "5", "7", "9x", "4", "47", "ü", "4ü"] {
        assert_eq!(error(text), PacketError::Type, "{text}");
    }
    for text in ["45[\"a\"]", "45x-[\"a\"]", "42/other,[\"a\"]", "43[]", "4212345678901234567[\"a\"]"] {
        assert_eq!(error(text), PacketError::Header, "{text}");
    }
    for text in ["42", "42[]", "42[1]", "42{}", "42[\"a\"", "42[\"a\"]x", "40x", "0", "42[\"a\",]"] {
        assert_eq!(error(text), PacketError::Body, "{text}");
    }
    assert_eq!(error(r#"452-["a",{"_placeholder":true,"num":0}]"#), PacketError::Attachments(2));
    assert_eq!(error(&format!("42[\"a\",{}]", "[".repeat(100_000))), PacketError::Depth);
    assert_eq!(error(&format!("42[\"a\",{}1{}]", "[".repeat(40), "]".repeat(40))), PacketError::Depth);
    assert!(matches!(error(&format!("42[\"{}\"]", "a".repeat(TEXT_BYTES_MAX))), PacketError::TooLong(_)));
    // Brackets within a string are no depth.
    assert!(read(&format!("42[\"a\",\"{}\\\"{}\"]", "[".repeat(100), "{".repeat(100))).is_ok());
}

#[test]
fn a_placeholder_points_to_the_attachment_and_nowhere_else() {
    for text in [
        // Announced, but without a place.
        r#"451-["a",1]"#,
        // Twice.
        r#"451-["a",[{"_placeholder":true,"num":0},{"_placeholder":true,"num":0}]]"#,
        // To one that isn't there: a receiver's parser would close its connection.
        r#"451-["a",{"_placeholder":true,"num":1}]"#,
        r#"451-["a",[{"_placeholder":true,"num":0},{"_placeholder":true,"num":1}]]"#,
        r#"42["a",{"_placeholder":true,"num":0}]"#,
        r#"42["a",{"\u005fplaceholder":true,"num":3}]"#,
        r#"42["a",{"num":{"_placeholder":true,"num":3}}]"#,
        r#"42["a",{"x":[{"_placeholder":true}]}]"#,
        // Beside the first argument.
        r#"451-["a",1,{"_placeholder":true,"num":0}]"#,
        r#"431[{"_placeholder":true,"num":0}]"#,
    ] {
        assert_eq!(error(text), PacketError::Placeholder, "{text}");
    }
    assert!(read(r#"42["a",{"text":"_placeholder","num":7}]"#).is_ok());
}

fn json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<String>().prop_map(Into::into),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
            prop::collection::btree_map(any::<String>(), inner, 0..4)
                .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        name in any::<String>(),
        argument in json(),
        ack in prop::option::of(0..1_u64 << 53),
        blob in prop::option::of(prop::collection::vec(any::<u8>(), 0..64)),
    ) {
        let blob = blob.map(Bytes::from);
        let argument = match &blob {
            Some(_) => format!("[{argument},{PLACEHOLDER}]"),
            None => argument.to_string(),
        };
        let frame = event(&name, &argument, ack, blob.clone());
        let mut decoder = Decoder::default();
        let packet = match (decoder.text(&frame.text).unwrap(), &frame.blob) {
            (Some(packet), None) => packet,
            (None, Some(blob)) => decoder.binary(blob.clone()).unwrap(),
            other => panic!("{other:?}"),
        };
        let Packet::Event(got) = packet else { panic!("{packet:?}") };
        prop_assert_eq!(got.name, name);
        prop_assert_eq!(got.ack, ack);
        prop_assert_eq!(got.blob, blob);
        // Byte for byte: what one client sends is what the other one gets.
        let passed = got.argument.unwrap();
        prop_assert_eq!(passed.get(), &argument);
    }

    #[test]
    fn garbage_never_panics(text in any::<String>(), prefix in "[0-6]{0,3}(1-)?[0-9]{0,3}", body in json()) {
        let _ = read(&text);
        let _ = read(&format!("{prefix}{text}"));
        let _ = read(&format!("{prefix}{body}"));
    }

    #[test]
    fn requests_never_panic(
        name in "publish|subscribe|unsubscribe|rpc|fast-rpc|rpc-raw|rpc-raw-response|wait-for-interest|rpc-service",
        body in json(),
        blob in prop::option::of(Just(Bytes::from_static(b"x"))),
    ) {
        let argument = serde_json::value::to_raw_value(&body).unwrap();
        let _ = crate::wire::event::request(Event { ack: None, name, argument: Some(argument), blob });
    }
}
