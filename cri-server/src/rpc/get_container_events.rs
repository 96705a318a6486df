//! GetContainerEvents: what happens to pods and containers, from the moment of the call on.
//!
//! A client that does not read is cut off with RESOURCE_EXHAUSTED instead of losing events unnoticed: it lists, and listens anew.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use caisson_cri_api::v1::{self, ContainerEventType};
use caisson_sandbox::events::{Change, Event, Subscription};
use tokio_stream::Stream;
use tonic::Status;

use crate::{answer, runtime::Runtime, status::RpcError};

pub(super) async fn handle(runtime: &Runtime, _: v1::GetEventsRequest) -> Result<Events, RpcError> {
    Ok(Events(runtime.sandboxes.events()?))
}

/// Events as they go to the client.
pub struct Events(Subscription);

impl Stream for Events {
    type Item = Result<v1::ContainerEventResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next(context).map(|next| {
            next.map(|event| match event {
                Ok(event) => Ok(response(&event)),
                Err(error) => Err(Status::from(&RpcError::from(error))),
            })
        })
    }
}

fn response(event: &Event) -> v1::ContainerEventResponse {
    let kind = match event.change {
        Change::Created => ContainerEventType::ContainerCreatedEvent,
        Change::Started => ContainerEventType::ContainerStartedEvent,
        Change::Stopped => ContainerEventType::ContainerStoppedEvent,
        Change::Deleted => ContainerEventType::ContainerDeletedEvent,
    };
    let containers = event.picture.containers.iter().cloned();
    v1::ContainerEventResponse {
        container_id: event.subject.clone(),
        container_event_type: kind as i32,
        created_at: answer::nanos(event.at),
        pod_sandbox_status: Some(answer::sandbox_status(event.picture.sandbox.clone())),
        containers_statuses: containers.map(answer::container_status).collect(),
    }
}
