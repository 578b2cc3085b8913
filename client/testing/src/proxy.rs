//! What clients connect to: it keeps its address while brokers come and go behind it, and is the network that fails.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Bytes taken from the broker at a time.
const CHUNK: usize = 64 << 10;
/// Pause after a connection that the system does not give.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    network: Arc<Network>,
    _accepting: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Network {
    route: watch::Sender<Route>,
    delay: watch::Sender<Duration>,
}

/// Where new connections go, and what ends those that are open.
#[derive(Clone, Debug)]
struct Route {
    broker: SocketAddr,
    cut: CancellationToken,
}

impl Proxy {
    /// Listens on a port that the system picks.
    pub(crate) async fn start(broker: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let route = watch::Sender::new(Route { broker, cut: CancellationToken::new() });
        let network = Arc::new(Network { route, delay: watch::Sender::new(Duration::ZERO) });
        let accepting = AbortOnDropHandle::new(tokio::spawn(accept(listener, network.clone())));
        Ok(Self { address, network, _accepting: accepting })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts what is open.
    pub(crate) fn disconnect(&self) {
        self.network.route.send_modify(|route| std::mem::take(&mut route.cut).cancel());
    }

    /// Another broker from now on, for new connections.
    pub(crate) fn forward_to(&self, broker: SocketAddr) {
        self.network.route.send_modify(|route| route.broker = broker);
    }

    pub(crate) fn delay(&self, by: Duration) {
        self.network.delay.send_replace(by);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.disconnect();
    }
}

async fn accept(listener: TcpListener, network: Arc<Network>) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                let Route { broker, cut } = network.route.borrow().clone();
                let delay = network.delay.subscribe();
                // Either side may end a connection, and that is all there is to say about it.
                tokio::spawn(async move { cut.run_until_cancelled(forward(client, broker, delay)).await });
            }
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn forward(client: TcpStream, broker: SocketAddr, delay: watch::Receiver<Duration>) -> io::Result<()> {
    let broker = TcpStream::connect(broker).await?;
    client.set_nodelay(true)?;
    broker.set_nodelay(true)?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_broker, mut to_broker) = broker.into_split();
    let requests = async {
        copy(&mut from_client, &mut to_broker).await?;
        to_broker.shutdown().await
    };
    let replies = async {
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = from_broker.read(&mut chunk).await?;
            if read == 0 {
                return to_client.shutdown().await;
            }
            let by = *delay.borrow();
            if !by.is_zero() {
                sleep(by).await;
            }
            to_client.write_all(&chunk[..read]).await?;
        }
    };
    tokio::try_join!(requests, replies).map(drop)
}
