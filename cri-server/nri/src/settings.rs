//! What is configured.

use std::{path::PathBuf, time::Duration};

/// How NRI is served.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Programs that the daemon starts, named `NN-name`; `None`: none. A directory that is not there has none.
    pub plugin_dir: Option<PathBuf>,
    /// Their configuration, `NN-name.conf` or `name.conf`.
    pub plugin_config_dir: PathBuf,
    /// From connecting to RegisterPlugin.
    pub registration_timeout: Duration,
    /// For each call to a plugin.
    pub request_timeout: Duration,
    /// What plugins are told of the runtime.
    pub runtime_name: String,
    /// What plugins are told of the runtime.
    pub runtime_version: String,
}
