//! The object tier over S3, against the few calls of its API that are used: signed PUT and GET of whole
//! objects, and DeleteObjects.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use baton_tiers::record::Shape;
use baton_tiers::{Block, ObjectTier, Pool, Read};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;

const SHAPE: Shape = Shape {
    kv_digest: [0xcd; 32],
    block_bytes: 5000,
};

#[derive(Default)]
struct Bucket {
    objects: HashMap<String, Vec<u8>>,
    calls: Vec<(Method, String)>,
    down: bool,
}

type Shared = Arc<Mutex<Bucket>>;

async fn answer(request: Request<Incoming>, bucket: Shared) -> Result<Response<Full<Bytes>>, Infallible> {
    let respond = |status: StatusCode, body: Vec<u8>| {
        let response = Response::builder().status(status);
        let response = response
            .header("etag", "\"e\"")
            .header("last-modified", "Tue, 24 Nov 2026 11:00:00 GMT");
        Ok(response.body(Full::new(Bytes::from(body))).expect("a response"))
    };
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let query = request.uri().query().unwrap_or_default().to_owned();
    let signed = request.headers().get("authorization").is_some_and(|v| {
        let text = v.to_str().unwrap_or_default();
        text.starts_with("AWS4-HMAC-SHA256 Credential=key/") && text.contains("/us-west-7/s3/aws4_request")
    });
    let body = request.into_body().collect().await.expect("a body").to_bytes();
    let mut bucket = bucket.lock().expect("not poisoned");
    bucket.calls.push((method.clone(), path.clone()));
    if !signed {
        return respond(StatusCode::FORBIDDEN, Vec::new());
    }
    if bucket.down {
        return respond(StatusCode::SERVICE_UNAVAILABLE, Vec::new());
    }
    let gone = b"<Error><Code>NoSuchKey</Code></Error>".to_vec();
    match method {
        Method::PUT => {
            bucket.objects.insert(path, body.to_vec());
            respond(StatusCode::OK, Vec::new())
        }
        Method::GET => match bucket.objects.get(&path) {
            Some(object) => respond(StatusCode::OK, object.clone()),
            None => respond(StatusCode::NOT_FOUND, gone),
        },
        // DeleteObjects: what to delete stands in the body.
        Method::POST if query == "delete" => {
            let text = String::from_utf8(body.to_vec()).expect("XML");
            let keys: Vec<&str> = text
                .split("<Key>")
                .skip(1)
                .filter_map(|rest| rest.split("</Key>").next())
                .collect();
            let mut answer = "<DeleteResult>".to_owned();
            for key in keys {
                bucket.objects.remove(&format!("{}/{key}", path.trim_end_matches('/')));
                answer += &format!("<Deleted><Key>{key}</Key></Deleted>");
            }
            respond(StatusCode::OK, (answer + "</DeleteResult>").into_bytes())
        }
        _ => respond(StatusCode::METHOD_NOT_ALLOWED, Vec::new()),
    }
}

async fn start() -> (Shared, ObjectTier) {
    let bucket = Shared::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
    let shared = bucket.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let bucket = shared.clone();
            let service = hyper::service::service_fn(move |request| answer(request, bucket.clone()));
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    let variables = [
        ("AWS_ENDPOINT", endpoint.as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_REGION", "us-west-7"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_NONSENSE", "ignored"),
        ("PATH", "ignored"),
    ];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let tier = ObjectTier::open("s3://bucket/some/prefix", SHAPE, variables).expect("settings make sense");
    (bucket, tier)
}

fn block(pool: &Pool, value: u8) -> Block {
    let fill = |bytes: &mut [u8]| {
        bytes.fill(value);
        true
    };
    pool.fill(fill).expect("room")
}

#[tokio::test]
async fn blocks_go_to_s3_and_come_back() {
    let (bucket, tier) = start().await;
    let pool = Pool::new(SHAPE.block_bytes, 3);
    let name = [0x34; 16];
    assert!(matches!(tier.get(name, &pool).await, Read::Missing));
    assert!(tier.put(name, 3, block(&pool, 5)).await);
    let key = format!("/bucket/some/prefix/{}/34/{}", "cd".repeat(32), "34".repeat(16));
    assert_eq!(bucket.lock().expect("not poisoned").objects[&key].len(), 5128);
    let Read::Found(found) = tier.get(name, &pool).await else {
        panic!("it is there")
    };
    assert_eq!(found.as_ref(), [5; 5000]);
    drop(found);

    // A flipped bit, an object cut short, one that is far too long: misses, and deleted.
    let good = bucket.lock().expect("not poisoned").objects[&key].clone();
    let mut flipped = good.clone();
    flipped[4000] ^= 0x20;
    for bad in [flipped, good[..1000].to_vec(), vec![0; 1 << 20], Vec::new()] {
        bucket.lock().expect("not poisoned").objects.insert(key.clone(), bad);
        assert!(matches!(tier.get(name, &pool).await, Read::Broken));
        assert!(bucket.lock().expect("not poisoned").objects.is_empty());
    }
    assert_eq!(pool.available(), 3, "no buffer is lost");
}

#[tokio::test]
async fn a_store_that_is_down_is_a_failure_not_a_miss() {
    let (bucket, tier) = start().await;
    let pool = Pool::new(SHAPE.block_bytes, 2);
    bucket.lock().expect("not poisoned").down = true;
    assert!(matches!(tier.get([1; 16], &pool).await, Read::Failed));
    assert!(!tier.put([1; 16], 3, block(&pool, 1)).await);
    let calls = bucket.lock().expect("not poisoned").calls.len();
    assert!(
        (2..=4).contains(&calls),
        "{calls} calls: each is tried once more at most"
    );
    bucket.lock().expect("not poisoned").down = false;
    assert!(matches!(tier.get([1; 16], &pool).await, Read::Missing));
}
