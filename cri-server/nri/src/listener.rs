//! Where plugins come from: the socket, and the programs that are started.

use std::{sync::Arc, time::Duration};

use tokio::{
    net::{UnixListener, UnixStream},
    task::JoinSet,
};

use crate::{
    Nri, NriError,
    error::JoinError,
    launch::{self, Process, Program},
    plugin::{self, Identity, Plugin},
};

/// How long the listener rests after a failure to accept, of which there may be one after the other.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Plugins being served. Dropped, the socket is closed, and what was started is killed.
pub struct Serving {
    _tasks: JoinSet<()>,
}

impl Nri {
    /// Starts the programs, waits until they have come in or failed to, and then takes what connects to `listener`, which does not block.
    /// Must be called within the runtime.
    pub async fn serve(
        self: &Arc<Self>,
        listener: Option<std::os::unix::net::UnixListener>,
    ) -> Result<Serving, NriError> {
        let mut tasks = JoinSet::new();
        if let Some(dir) = self.settings.plugin_dir.clone() {
            let config_dir = self.settings.plugin_config_dir.clone();
            let found = tokio::task::spawn_blocking(move || launch::programs(&dir, &config_dir)).await;
            let programs = found.map_err(|error| NriError::Plugins {
                path: self.settings.plugin_dir.clone().unwrap_or_default(),
                reason: error.to_string(),
            })??;
            for program in programs {
                self.start(program, &mut tasks).await;
            }
        }
        if let Some(listener) = listener {
            let listener = UnixListener::from_std(listener).map_err(NriError::Socket)?;
            let nri = self.clone();
            tasks.spawn(async move { accept(nri, listener).await });
        }
        Ok(Serving { _tasks: tasks })
    }

    /// A program that fails is told and left out, as in the reference.
    async fn start(self: &Arc<Self>, program: Program, tasks: &mut JoinSet<()>) {
        let name = program.identity.to_string();
        let joined = async {
            let place = self.place()?;
            let (stream, process) = program.start()?;
            let launched = Some((program.identity, program.config, process));
            let life = self.join(stream, launched).await?;
            Ok::<_, JoinError>((place, life))
        };
        match joined.await {
            Ok((place, life)) => {
                tasks.spawn(async move {
                    let _place = place;
                    life.await;
                });
            }
            Err(error) => tell(&name, &error),
        }
    }

    /// Registers, configures and synchronizes. What comes back serves the plugin's own requests until its end.
    async fn join(
        self: &Arc<Self>,
        stream: UnixStream,
        launched: Option<(Identity, String, Process)>,
    ) -> Result<impl Future<Output = ()> + Send + use<>, JoinError> {
        let (plugin, incoming) = Plugin::join(stream, launched, &self.settings).await?;
        let identity = plugin.identity.clone();
        let connection = plugin.connection();
        // A plugin may ask for updates while it is synchronized.
        let mut serving = JoinSet::new();
        serving.spawn(plugin::serve(identity, connection, incoming, self.node.clone()));
        self.admit(plugin).await?;
        Ok(async move { while serving.join_next().await.is_some() {} })
    }
}

fn tell(name: &str, error: &JoinError) {
    let mut chain = error.to_string();
    if let Some(source) = std::error::Error::source(error) {
        chain = format!("{chain}: {source}");
    }
    tracing::warn!(plugin = name, error = chain, "NRI plugin is not taken");
}

async fn accept(nri: Arc<Nri>, listener: UnixListener) {
    let mut plugins = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let nri = nri.clone();
                    plugins.spawn(async move {
                        let place = nri.place();
                        let joined = match &place {
                            Ok(_) => nri.join(stream, None).await,
                            Err(_) => Err(JoinError::Closed),
                        };
                        match (place, joined) {
                            (Err(error), _) | (_, Err(error)) => tell("(connecting)", &error),
                            (Ok(_place), Ok(life)) => life.await,
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "an NRI plugin could not connect");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(ended) = plugins.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "the task of an NRI plugin ended badly");
                }
            }
        }
    }
}
