//! Questions that the owner loop does not answer itself: it hands out what it knows ([`crate::look::Sight`]), and the rest is done here.
//!
//! Whatever asks the kernel runs on a thread of its own; lists of all connections one after the other, because each costs the kernel a walk
//! through its tables.

use std::net::IpAddr;

use farm_core::api::flows::{MAX_SOME, SomeFlows};
use farm_core::balance::explain::Inquiry;
use hyper::StatusCode;
use tokio::sync::Semaphore;

use super::{ANSWER_LIMIT, Answered, Refusal, ask, whole};
use crate::event::{EventSender, Query};
use crate::look::flows::{FlowFilter, FlowsError};
use crate::look::map::{MapError, MapFilter};
use crate::look::why::WhyError;
use crate::look::{aside, flows as look_flows, map as look_map, why as look_why};

/// One list of all connections is made at a time.
static LISTING: Semaphore = Semaphore::const_new(1);

/// Answers `/v1/why`.
pub(super) async fn why(events: &EventSender, inquiry: Inquiry) -> Result<Answered, Refusal> {
    let sight = ask(events, |answer| Query::Sight(Some(inquiry), answer)).await?;
    let has = match look_why::connection(&inquiry) {
        Some(connection) => match aside("why", move || look_why::is_here(connection)).await {
            Ok(has) => Some(has),
            // The rest of the answer stands without it.
            Err(error) => {
                tracing::warn!(%error, "one connection could not be looked up");
                None
            }
        },
        None => None,
    };
    let answer = look_why::answer(&sight, &inquiry, has).map_err(|error| {
        let status = match error {
            WhyError::NoVip { .. } => StatusCode::NOT_FOUND,
            WhyError::NeedsPort { .. } => StatusCode::BAD_REQUEST,
        };
        Refusal::new(status, error.to_string())
    })?;
    Ok(whole(StatusCode::OK, &answer))
}

/// Answers `/v1/map`.
pub(super) async fn map(events: &EventSender, filter: &MapFilter) -> Result<Answered, Refusal> {
    let sight = ask(events, |answer| Query::Sight(None, answer)).await?;
    let answer = look_map::answer(&sight, filter).map_err(|error| match error {
        MapError::NoModule(_) | MapError::NoGroup { .. } => Refusal::new(StatusCode::NOT_FOUND, error.to_string()),
    })?;
    Ok(whole(StatusCode::OK, &answer))
}

/// Answers `/v1/has`.
pub(super) async fn has(asked: SomeFlows) -> Result<Answered, Refusal> {
    if asked.flows.len() > MAX_SOME {
        let error = format!(
            "{} connections are asked for, {MAX_SOME} at most are expected",
            asked.flows.len()
        );
        return Err(Refusal::bad(error));
    }
    let answer = aside("has", move || look_flows::has(&asked)).await.map_err(|error| {
        let why = format!("the connections cannot be looked up: {error}");
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, why)
    })?;
    Ok(whole(StatusCode::OK, &answer))
}

/// Answers `/v1/flows`.
pub(super) async fn flows(events: &EventSender, filter: FlowFilter) -> Result<Answered, Refusal> {
    let unavailable = |why: String| Refusal::new(StatusCode::SERVICE_UNAVAILABLE, why);
    let turn = tokio::time::timeout(ANSWER_LIMIT, LISTING.acquire()).await;
    let turn = turn
        .ok()
        .and_then(Result::ok)
        .ok_or_else(|| unavailable("another list of connections is being made".to_owned()))?;
    let sight = ask(events, |answer| Query::Sight(None, answer)).await?;
    let answer = aside("flows", move || {
        // The turn is over when the kernel has answered, although whoever asked may have gone before.
        let _turn = turn;
        let vips: Vec<IpAddr> = sight.plan.vips.iter().map(|vip| vip.addr).collect();
        let connections = look_flows::list(&vips)?;
        Ok(look_flows::answer(&sight, &filter, connections))
    });
    let answer = answer
        .await
        .map_err(|error| unavailable(format!("the connections cannot be listed: {error}")))?
        .map_err(|error| match error {
            FlowsError::NoNode { .. } | FlowsError::NoModule(_) => {
                Refusal::new(StatusCode::NOT_FOUND, error.to_string())
            }
        })?;
    Ok(whole(StatusCode::OK, &answer))
}
