//! A response without a connection: it goes on when its client is gone, and is stored however it ends.
//!
//! ```text
//!  request ─▶ resp_X.open stored ─▶ task: start ─▶ pieces ─▶ settle ─▶ resp_X stored ─▶ resp_X.open forgotten
//!                                     │ cancel, shutdown, too long, ended elsewhere
//!                                     ╰──▶ run dropped (settled as cancelled) ─▶ resp_X stored
//! ```
//!
//! A process that dies leaves `resp_X.open`. A minute later whoever asks for it stores that it failed. It is not run again by
//! itself: nothing was told of it and nothing is charged for it, and only the client knows whether it still wants it.
//!
//! What its client is charged for is what was settled: all tokens of one that ends by itself; of one that is cancelled, those
//! that its stored output, or its stream, has.

use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use serde_json::Value as Json;
use tokio::sync::oneshot;

use super::desk::{Background, Responses};
use super::events::{Events, Style, status_of};
use super::log::{Log, follow};
use super::object::{Face, Status};
use super::request::{self, Wish};
use super::store::{Kept, Stored, open_name};
use super::{event_stream, for_input};
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::Backend;
use crate::clock::unix_ms;
use crate::gateway::Gateway;
use crate::generation::answer;
use crate::generation::intake::Received;
use crate::generation::output::Outcome;
use crate::generation::run::{Run, Step};
use crate::generation::start::start;
use crate::generation::stream::Frames;

/// How often it is looked whether a response has ended elsewhere.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Tries to store an end: long enough for a new Raft leader.
const KEEP_TRIES: u32 = 10;
const KEEP_PAUSE: Duration = Duration::from_secs(1);

/// One response's run.
struct Work<B: Backend> {
    gateway: Arc<Gateway<B>>,
    responses: Arc<Responses>,
    background: Arc<Background>,
    caller: Caller,
    events: Events,
    frames: Frames,
    items: Vec<Json>,
    run: Option<Run<B>>,
}

/// Why it ended before its end.
enum Cut {
    /// Its client wants it no more.
    Cancelled,
    /// It was decided elsewhere how it ended.
    Elsewhere,
    Failed(ApiError),
}

/// Begins a response in the background and answers: with its events, or with how far it came in a moment.
pub(crate) async fn begin<B: Backend>(
    gateway: &Arc<Gateway<B>>,
    responses: &Arc<Responses>,
    received: Received,
    wish: Wish,
) -> Result<Response, ApiError> {
    let caller = received.origin.caller.clone();
    let face = Face {
        id: received.origin.names.request_id.clone(),
        created_at: received.arrived_unix_ms / 1000,
        echo: wish.echo.clone(),
    };
    let style = Style {
        quiet: !wish.stream,
        obfuscation: wish.obfuscation,
        background: true,
    };
    let bytes_max = responses.config.response_bytes_max;
    let background = Arc::new(Background {
        owner: caller.owner(),
        face: face.clone(),
        log: wish.stream.then(|| Arc::new(Log::new(bytes_max))),
        cancel: Default::default(),
        ended: Default::default(),
    });
    let items = [wish.earlier.as_slice(), &wish.input].concat();
    responses.prolong().await?;
    let open = Stored {
        response: face.shown(&Status::Queued, Vec::new(), None, 0),
        items: items.clone(),
        runner: Some(responses.runner.clone()),
        ..Stored::default()
    };
    match responses.store.keep_open(&caller, &face.id, &open).await? {
        Kept::Yes => {}
        Kept::Other => return Err(ApiError::internal()),
        Kept::No => {
            let message =
                "The conversation is larger than may be stored, which a response in the background has to be.";
            return Err(ApiError::field("input", message));
        }
    }
    responses.add(background.clone());
    let work = Work {
        gateway: gateway.clone(),
        responses: responses.clone(),
        background: background.clone(),
        caller,
        events: Events::new(face, style),
        frames: Frames::default(),
        items,
        run: None,
    };
    let (tell, mut told) = oneshot::channel();
    responses.tasks.spawn(work.through(received, wish.earlier, tell));
    let wait = Duration::from_millis(gateway.config.first_token_wait_ms);
    let started = tokio::time::timeout(wait, &mut told).await;
    let status = match started {
        Ok(Ok(Err(error))) => return Err(error),
        Ok(_) => Status::InProgress,
        Err(_) => {
            told.close();
            // It may have failed in this very moment.
            if let Ok(Err(error)) = told.try_recv() {
                return Err(error);
            }
            Status::Queued
        }
    };
    if let Some(log) = &background.log {
        return Ok(event_stream(follow(log.clone(), 0, gateway.config.keep_alive())));
    }
    let shown = background.face.shown(&status, Vec::new(), None, 0);
    Ok(answer::json(shown.to_string().into_bytes()))
}

impl<B: Backend> Work<B> {
    async fn through(mut self, received: Received, earlier: Vec<Json>, tell: oneshot::Sender<Result<(), ApiError>>) {
        self.events.begin(&mut self.frames);
        let _ = self.log();
        let id = self.background.face.id.clone();
        let mut tell = Some(tell);
        let ended = self.generate(received, earlier, &mut tell).await;
        // Nobody can take it back from here on.
        let ended = match ended {
            Ok(()) => self.settle().await.map_err(Cut::Failed),
            Err(cut) => Err(cut),
        };
        match ended {
            Ok((response, outcome)) => {
                self.events.end(&outcome, &response, &mut self.frames);
                let _ = self.log();
                self.keep(&id, response).await;
            }
            Err(Cut::Failed(error)) => {
                if let Some(tell) = tell
                    && tell.send(Err(error.clone())).is_ok()
                {
                    // Its client is told, and has no id to ask for.
                    let _ = self.responses.store.forget(&self.caller, &open_name(&id)).await;
                } else {
                    self.events.fail(&error, &mut self.frames);
                    let _ = self.log();
                    let response = self.events.shown(&Status::failed(&error), None, 0);
                    self.keep(&id, response).await;
                }
            }
            Err(Cut::Cancelled) => {
                let response = self.events.shown(&Status::Cancelled, None, 0);
                self.keep(&id, response).await;
                // What is stored is delivered.
                self.mark_delivered();
            }
            Err(Cut::Elsewhere) => {
                let _ = self.responses.store.forget(&self.caller, &open_name(&id)).await;
            }
        }
        drop(self.run.take());
        if let Some(log) = &self.background.log {
            log.close();
        }
        self.responses.remove(&id);
        self.background.ended.cancel();
    }

    /// Until the last token, or something else ends it.
    async fn generate(
        &mut self,
        received: Received,
        earlier: Vec<Json>,
        tell: &mut Option<oneshot::Sender<Result<(), ApiError>>>,
    ) -> Result<(), Cut> {
        let (background, responses) = (self.background.clone(), self.responses.clone());
        let caller = self.caller.clone();
        let most = Duration::from_secs(responses.config.background_s_max);
        tokio::select! {
            biased;
            () = background.cancel.cancelled() => Err(Cut::Cancelled),
            () = responses.stop.cancelled() => Err(Cut::Failed(ApiError::unavailable(
                "The coordinator that ran this response was shut down; send it again.",
            ))),
            () = ended_elsewhere(&responses, &caller, &background.face.id) => Err(Cut::Elsewhere),
            () = tokio::time::sleep(most) => Err(Cut::Failed(ApiError::unavailable(format!(
                "The response took longer than the {} seconds that one in the background may take.",
                most.as_secs()
            )))),
            ended = self.steps(received, earlier, tell) => ended.map_err(Cut::Failed),
        }
    }

    async fn steps(
        &mut self,
        received: Received,
        earlier: Vec<Json>,
        tell: &mut Option<oneshot::Sender<Result<(), ApiError>>>,
    ) -> Result<(), ApiError> {
        let id = self.background.face.id.clone();
        let parse = move |body: &[u8], config: &_| request::parse(body, config, &id, earlier);
        let started = start(&self.gateway, received, parse).await.map_err(for_input)?;
        let run = self.run.insert(started.run);
        if let Some(tell) = tell.take() {
            let _ = tell.send(Ok(()));
        }
        self.events.started(&mut self.frames);
        while let Step::Piece(piece) = run.step().await.map_err(for_input)? {
            let choice = piece.choice;
            self.events.piece(piece, &mut self.frames);
            let Some(log) = &self.background.log else { continue };
            if !log.take(&mut self.frames) {
                run.fail("its events are more than may be kept");
                let error = ApiError::unavailable("The response has more events than may be kept; do not stream it.");
                return Err(error);
            }
            run.mark_delivered(choice);
        }
        Ok(())
    }

    async fn settle(&mut self) -> Result<(Json, Outcome), ApiError> {
        let run = self.run.as_mut().ok_or_else(ApiError::internal)?;
        let outcome = run.settle().await?;
        let response = self
            .events
            .shown(&status_of(&outcome), Some(outcome.counts), unix_ms() / 1000);
        Ok((response, outcome))
    }

    /// Writes what there is to the log.
    fn log(&mut self) -> bool {
        match &self.background.log {
            Some(log) => log.take(&mut self.frames),
            None => true,
        }
    }

    fn mark_delivered(&mut self) {
        if let Some(run) = &mut self.run {
            run.mark_delivered(0);
        }
    }

    /// Stores how it ended, and forgets that it runs.
    async fn keep(&mut self, id: &str, response: Json) {
        let events = self.background.log.as_ref().map(|log| log.texts());
        let mut stored = Stored {
            response,
            items: self.items.clone(),
            events,
            ..Stored::default()
        };
        for attempt in 1..=KEEP_TRIES {
            match self.responses.store.keep(&self.caller, id, &stored).await {
                Ok(Kept::Yes | Kept::Other) => break,
                Ok(Kept::No) if stored.events.is_some() => stored.events = None,
                Ok(Kept::No) => {
                    let status = Status::Failed {
                        code: "server_error",
                        message: "The response is larger than may be stored.".into(),
                    };
                    stored.response = self.background.face.shown(&status, Vec::new(), None, 0);
                    stored.items.clear();
                }
                Err(error) if attempt == KEEP_TRIES => {
                    tracing::error!(
                        id,
                        error = error.message,
                        "a response in the background could not be stored"
                    );
                    return;
                }
                Err(_) => tokio::time::sleep(KEEP_PAUSE).await,
            }
        }
        // It goes by itself where this fails.
        let _ = self.responses.store.forget(&self.caller, &open_name(id)).await;
    }
}

/// Until it is decided elsewhere how the response ended. Meanwhile it says that this process lives.
async fn ended_elsewhere(responses: &Responses, caller: &Caller, id: &str) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if let Err(error) = responses.prolong().await {
            tracing::debug!(error = error.message, "it could not be said that this process lives");
        }
        if matches!(responses.store.is_over(caller, id), Ok(true)) {
            return;
        }
    }
}
