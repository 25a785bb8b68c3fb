//! The helper's services, as their host asks for them.

use std::time::Duration;

use cocalc_core::{
    apps::{Service, ServiceList, ServiceOutput},
    runner::{ExecRequest, Exit},
};

use super::{ANSWER_LIMIT, AgentError, AgentSocket, encode, millis, socket, text};
use crate::signals;

/// How many services are believed in.
const SERVICES_MAX: u32 = 64;
/// How much one piece of output is at most.
const OUTPUT_BYTES_MAX: usize = 48 << 10;

async fn ask(socket: &AgentSocket, kind: u8, body: &[u8], limit: Duration) -> Result<Vec<u8>, AgentError> {
    let attempt = async {
        let mut stream = socket.connect().await?;
        socket::send_request(&stream, kind, &[], body).await?;
        let mut buffer = Vec::new();
        socket::next_frame(&mut stream, &mut buffer).await
    };
    match tokio::time::timeout(ANSWER_LIMIT + limit, attempt).await {
        Ok(answer) => match answer? {
            answer if answer.first() == Some(&b'E') => {
                Err(AgentError::Refused(String::from_utf8_lossy(&answer[1..]).into_owned()))
            }
            answer => Ok(answer),
        },
        Err(_) => Err(AgentError::Silent),
    }
}

fn nonsense() -> AgentError {
    std::io::Error::from(std::io::ErrorKind::InvalidData).into()
}

pub(crate) async fn start<'a>(
    socket: &AgentSocket,
    name: &str,
    request: &'a ExecRequest,
    env: impl IntoIterator<Item = (&'a String, &'a String)>,
    home: &str,
) -> Result<(), AgentError> {
    let mut body = Vec::new();
    text(&mut body, name);
    body.extend(encode(request, env, home)?);
    match ask(socket, b'A', &body, Duration::ZERO).await?.as_slice() {
        b"S" => Ok(()),
        _ => Err(nonsense()),
    }
}

pub(crate) async fn list(
    socket: &AgentSocket,
    generation: u64,
    limit: Duration,
) -> Result<ServiceList, AgentError> {
    let mut body = generation.to_be_bytes().to_vec();
    body.extend(millis(limit).to_be_bytes());
    let answer = ask(socket, b'L', &body, limit).await?;
    parse(&answer).ok_or_else(nonsense)
}

/// Reads a list that a tenant may have made up.
pub(crate) fn parse(answer: &[u8]) -> Option<ServiceList> {
    let mut input = answer.strip_prefix(b"L")?;
    let mut number = |count: usize| -> Option<u64> {
        let (head, rest) = input.split_at_checked(count)?;
        input = rest;
        Some(head.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    let generation = number(8)?;
    let count = number(4).filter(|count| *count <= SERVICES_MAX.into())?;
    let mut services = Vec::new();
    for _ in 0..count {
        let length = usize::try_from(number(4)?).ok().filter(|length| *length <= 128)?;
        let bytes: Vec<u8> =
            (0..length).map(|_| number(1).and_then(|byte| u8::try_from(byte).ok())).collect::<Option<_>>()?;
        let name = String::from_utf8(bytes).ok()?;
        let (kind, code) = (number(1)?, u8::try_from(number(1)?).ok()?);
        let exit = match kind {
            0 => None,
            1 => Some(Exit::Code(code)),
            2 => Some(Exit::Signal(signals::name(code))),
            _ => return None,
        };
        let (run, ran) = (number(8)?, Duration::from_millis(number(8)?));
        services.push(Service { name, exit, run, ran });
    }
    Some(ServiceList { generation, services })
}

pub(crate) async fn output(
    socket: &AgentSocket,
    name: &str,
    offset: u64,
) -> Result<ServiceOutput, AgentError> {
    let mut body = Vec::new();
    text(&mut body, name);
    body.extend(offset.to_be_bytes());
    let answer = ask(socket, b'O', &body, Duration::ZERO).await?;
    parse_output(&answer).ok_or_else(nonsense)
}

/// Reads output that a tenant may have made up.
pub(crate) fn parse_output(answer: &[u8]) -> Option<ServiceOutput> {
    let (from, bytes) = answer.strip_prefix(b"O")?.split_first_chunk::<8>()?;
    let fits = bytes.len() <= OUTPUT_BYTES_MAX;
    fits.then(|| ServiceOutput { offset: u64::from_be_bytes(*from), bytes: bytes.to_vec() })
}

pub(crate) async fn stop(socket: &AgentSocket, name: &str, grace: Duration) -> Result<(), AgentError> {
    let mut body = Vec::new();
    text(&mut body, name);
    body.extend(millis(grace).to_be_bytes());
    ask(socket, b'K', &body, grace + Duration::from_secs(5)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_what_is_made_up_is_refused() {
        let mut answer = vec![b'L'];
        answer.extend(7_u64.to_be_bytes());
        answer.extend(1_u32.to_be_bytes());
        answer.extend(3_u32.to_be_bytes());
        answer.extend(b"web");
        answer.extend([1, 9]);
        answer.extend(2_u64.to_be_bytes());
        answer.extend(1500_u64.to_be_bytes());
        let list = parse(&answer).unwrap();
        let expected = Service {
            name: "web".into(),
            exit: Some(Exit::Code(9)),
            run: 2,
            ran: Duration::from_millis(1500),
        };
        assert_eq!((list.generation, list.services), (7, vec![expected]));
        for cut in 0..answer.len() {
            assert!(parse(&answer[..cut]).is_none(), "{cut}");
        }
        let mut many = vec![b'L'];
        many.extend(0_u64.to_be_bytes());
        many.extend(u32::MAX.to_be_bytes());
        assert!(parse(&many).is_none());
        let mut long = vec![b'L'];
        long.extend(0_u64.to_be_bytes());
        long.extend(1_u32.to_be_bytes());
        long.extend(u32::MAX.to_be_bytes());
        assert!(parse(&long).is_none());
    }
}
