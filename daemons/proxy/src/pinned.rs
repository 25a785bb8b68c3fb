//! Streams to hosts that end with the key that proved the host.

use std::{io, net::IpAddr, pin::Pin, sync::Arc, task::Context, time::Duration};

use async_trait::async_trait;
use cocalc_core::{
    connector::{Connector, Error, Service},
    ids::HostId,
    memory::router::TableRouter,
    router::Router,
    stream::{BoxStream, Notice, Noticed},
};
use tokio::sync::broadcast::error::RecvError;

/// Opens streams with another connector, and breaks them off when the host is
/// withdrawn, or comes with another key.
#[derive(Debug)]
pub(crate) struct Pinned {
    pub(crate) connector: Arc<dyn Connector>,
    pub(crate) table: TableRouter,
}

#[async_trait]
impl Connector for Pinned {
    async fn open(
        &self,
        host: HostId,
        service: Service,
        source: Option<IpAddr>,
        deadline: Duration,
    ) -> Result<BoxStream, Error> {
        // Before it is opened, so that no change falls in between.
        let (table, mut changes) = (self.table.clone(), self.table.changes());
        let key = move || table.host(host).map(|address| address.identity);
        let before = key();
        let stream = self.connector.open(host, service, source, deadline).await?;
        let ended = async move {
            while key() == before {
                match changes.recv().await {
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return,
                }
            }
        };
        Ok(Box::pin(Noticed::new(stream, Until(Some(Box::pin(ended))))))
    }
}

/// Notices that a stream is to end; none once it has.
struct Until(Option<Pin<Box<dyn Future<Output = ()> + Send>>>);

impl Notice for Until {
    fn before_read(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        // Here it is waited for: whoever carries a stream always reads it.
        if let Some(ended) = &mut self.0
            && ended.as_mut().poll(cx).is_ready()
        {
            self.0 = None;
        }
        self.before_write()
    }

    fn before_write(&mut self) -> io::Result<()> {
        match self.0 {
            Some(_) => Ok(()),
            None => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the host's key is good no more")),
        }
    }
}

#[cfg(test)]
mod tests {
    use cocalc_core::{
        ids::{Epoch, ProjectId},
        router::HostAddress,
    };
    use tokio::io::AsyncReadExt;

    use super::*;

    #[derive(Debug)]
    struct Endless;

    #[async_trait]
    impl Connector for Endless {
        async fn open(
            &self,
            _: HostId,
            _: Service,
            _: Option<IpAddr>,
            _: Duration,
        ) -> Result<BoxStream, Error> {
            let (near, far) = tokio::io::duplex(64);
            tokio::spawn(async move {
                let _kept = far;
                std::future::pending::<()>().await;
            });
            Ok(Box::pin(near))
        }
    }

    #[tokio::test]
    async fn a_stream_ends_with_its_hosts_key_and_no_other() {
        let (host, other) = (HostId::random(), HostId::random());
        let table = TableRouter::default();
        let at = |identity: &str| HostAddress { identity: identity.to_owned(), ..HostAddress::default() };
        for id in [host, other] {
            table.set_host(id, at("key"));
            table.set_owner(ProjectId::random(), id, Epoch::FIRST);
        }
        let pinned = Pinned { connector: Arc::new(Endless), table: table.clone() };
        let limit = Duration::from_secs(5);
        let mut stream = pinned.open(host, Service::Http, None, limit).await.unwrap();
        let mut stays = pinned.open(other, Service::Http, None, limit).await.unwrap();
        let reading = tokio::spawn(async move { stream.read_u8().await.unwrap_err().kind() });
        // It is elsewhere, with the same key: nothing ends.
        table.set_host(host, HostAddress { url: "http://x".to_owned(), ..at("key") });
        tokio::task::yield_now().await;
        assert!(!reading.is_finished());
        table.set_host(host, at(""));
        assert_eq!(reading.await.unwrap(), io::ErrorKind::ConnectionAborted);
        assert!(tokio::time::timeout(Duration::from_millis(50), stays.read_u8()).await.is_err());
    }
}
