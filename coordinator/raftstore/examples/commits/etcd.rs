//! As much of etcd's gRPC interface as a put needs.

use crate::Failure;
use std::time::Duration;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

/// Connections to one endpoint: one HTTP/2 connection's flow control would slow a thousand writers down.
const CONNECTIONS_MAX: u64 = 8;

#[derive(Clone, PartialEq, prost::Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// The header is not looked at.
#[derive(Clone, PartialEq, prost::Message)]
struct PutResponse {}

#[derive(Clone)]
pub struct Client {
    channels: Vec<Channel>,
}

impl Client {
    pub async fn connect(endpoints: &[String], writers: u64) -> Result<Self, Failure> {
        let mut channels = Vec::new();
        for _ in 0..writers.div_ceil(endpoints.len() as u64).min(CONNECTIONS_MAX) {
            for endpoint in endpoints {
                let endpoint = Endpoint::from_shared(endpoint.clone())?
                    .connect_timeout(Duration::from_secs(5))
                    .tcp_nodelay(true);
                channels.push(endpoint.connect().await?);
            }
        }
        Ok(Self { channels })
    }

    /// Writes a key, through the connection that `turn` picks.
    pub async fn put(&self, key: Vec<u8>, value: Vec<u8>, turn: u64) -> Result<(), Failure> {
        let channel = self.channels[turn as usize % self.channels.len()].clone();
        let mut client = Grpc::new(channel);
        client.ready().await?;
        let path = PathAndQuery::from_static("/etcdserverpb.KV/Put");
        let codec: ProstCodec<PutRequest, PutResponse> = ProstCodec::default();
        client
            .unary(tonic::Request::new(PutRequest { key, value }), path, codec)
            .await?;
        Ok(())
    }
}
