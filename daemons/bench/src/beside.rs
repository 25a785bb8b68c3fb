//! A loop of requests over a loopback connection, as an app serves them while
//! something else happens on the machine.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::Result;

/// Between two requests.
const PAUSE: Duration = Duration::from_millis(2);
/// Of a request, and of its answer.
const BYTES: usize = 1024;

pub(crate) struct Loop {
    ended: Arc<AtomicBool>,
    client: JoinHandle<std::io::Result<Vec<Duration>>>,
}

impl Loop {
    pub(crate) fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut client = TcpStream::connect(listener.local_addr()?)?;
        let (mut server, _) = listener.accept()?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        thread::spawn(move || {
            let mut request = [0; BYTES];
            while server.read_exact(&mut request).is_ok() && server.write_all(&request).is_ok() {}
        });
        let ended = Arc::new(AtomicBool::new(false));
        let end = ended.clone();
        let client = thread::spawn(move || {
            let (mut took, mut answer) = (Vec::new(), [0; BYTES]);
            while !end.load(Ordering::Acquire) {
                let begun = Instant::now();
                client.write_all(&answer)?;
                client.read_exact(&mut answer)?;
                took.push(begun.elapsed());
                thread::sleep(PAUSE);
            }
            Ok(took)
        });
        Ok(Self { ended, client })
    }

    /// The 99th percentile, in microseconds.
    pub(crate) fn end(self) -> Result<f64> {
        self.ended.store(true, Ordering::Release);
        let mut took = self.client.join().map_err(|_| "a thread failed")??;
        took.sort_unstable();
        let p99 = took.get((took.len() * 99 / 100).min(took.len().saturating_sub(1)));
        Ok(p99.ok_or("no request was answered")?.as_secs_f64() * 1e6)
    }
}
