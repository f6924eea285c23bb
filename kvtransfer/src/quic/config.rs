//! quinn and TLS settings of the transport, and the socket.

use crate::{SetupError, TransferLimits};
use baton_identity::{Identity, Role};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
};
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

/// The protocol in TLS. Without a version: versions are compared in the hello, which can say what is wrong.
const ALPN: &[u8] = b"baton-kv";

/// Largest datagram tried by path MTU discovery, in bytes. Big datagrams are what makes loopback and jumbo-frame
/// networks fast; ten of them, the most the sender hands to the kernel at once, stay below UDP's 64 KiB.
const DATAGRAM_BYTES_MAX: u16 = 6_400;

/// Socket buffers asked for, in bytes: some milliseconds of 10 Gbit/s. The kernel may grant less.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Streams that are no pushes: the link of [`crate::nixl`].
const LINKS_MAX: u32 = 1;

/// The bound endpoint and the configuration to dial with.
pub(super) fn endpoint(
    addr: SocketAddr,
    identity: &Identity,
    limits: &TransferLimits,
) -> Result<(Endpoint, ClientConfig), SetupError> {
    let tls = |error: &dyn std::fmt::Display| SetupError::Identity(error.to_string());
    let server = identity
        .quic_server(&[Role::Worker], ALPN)
        .map_err(|error| tls(&error))?;
    let server = QuicServerConfig::try_from(server).map_err(|error| tls(&error))?;
    let client = identity.quic_client(ALPN).map_err(|error| tls(&error))?;
    let client = QuicClientConfig::try_from(client).map_err(|error| tls(&error))?;

    let mut server = ServerConfig::with_crypto(Arc::new(server));
    server
        .transport_config(Arc::new(transport(
            limits,
            limits.pushes_per_connection_max.saturating_add(LINKS_MAX),
        )?))
        // Workers do not change their address in the middle of a push.
        .migration(false)
        .max_incoming(limits.connections_max);
    let mut client = ClientConfig::new(Arc::new(client));
    // Pushes go from the side that dials to the side that accepts; the other way needs no streams.
    client.transport_config(Arc::new(transport(limits, 0)?));

    let bind_error = |source: std::io::Error| SetupError::Bind { addr, source };
    let socket = UdpSocket::bind(addr).map_err(bind_error)?;
    // Best effort: smaller buffers cost speed under bursts, nothing else.
    let _ = set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    let _ = set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    let mut endpoint_config = EndpointConfig::default();
    endpoint_config
        .max_udp_payload_size(DATAGRAM_BYTES_MAX)
        .map_err(|error| SetupError::Limits(error.to_string()))?;
    let runtime = quinn::default_runtime().ok_or(SetupError::NoRuntime)?;
    let endpoint = Endpoint::new(endpoint_config, Some(server), socket, runtime).map_err(bind_error)?;
    Ok((endpoint, client))
}

fn transport(limits: &TransferLimits, streams_max: u32) -> Result<TransportConfig, SetupError> {
    let idle = IdleTimeout::try_from(limits.idle_timeout)
        .map_err(|_| SetupError::Limits(format!("idle_timeout {:?} is too long", limits.idle_timeout)))?;
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(DATAGRAM_BYTES_MAX);
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(limits.keep_alive))
        .max_concurrent_bidi_streams(VarInt::from_u32(streams_max))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(limits.flow_window_bytes))
        .receive_window(VarInt::from_u32(limits.flow_window_bytes))
        .send_window(limits.flow_window_bytes.into())
        .mtu_discovery_config(Some(mtu));
    Ok(config)
}
