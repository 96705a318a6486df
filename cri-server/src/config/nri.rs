//! `[nri]`: plugins of the Node Resource Interface.

use std::path::PathBuf;

use caisson_nri::Settings;

use super::reader::Section;
use crate::runtime::{NAME, VERSION};

/// Where plugins look for the runtime when they are told nothing else.
pub const DEFAULT_SOCKET: &str = "/var/run/nri/nri.sock";

/// How plugins are served, and where.
#[derive(Debug, Clone)]
pub struct NriConfig {
    /// Where plugins connect; `None`: only those that the daemon starts are served.
    pub socket: Option<PathBuf>,
    /// All else.
    pub settings: Settings,
}

/// `None`: NRI is switched off.
pub(super) fn nri(top: &mut Section) -> Option<NriConfig> {
    top.section("nri", |nri| {
        let enabled = nri.flag("enabled", true);
        let connections = nri.flag("connections", true);
        let socket = nri.absolute("socket", DEFAULT_SOCKET);
        if socket.as_os_str().len() > 100 {
            nri.problem(
                "socket",
                format!("{} is too long for a Unix socket", socket.display()),
            );
        }
        let settings = Settings {
            plugin_dir: Some(nri.absolute("plugin_dir", "/opt/nri/plugins")),
            plugin_config_dir: nri.absolute("plugin_config_dir", "/etc/nri/conf.d"),
            registration_timeout: nri.seconds("registration_timeout_seconds", 5, 1..=60),
            request_timeout: nri.seconds("request_timeout_seconds", 2, 1..=60),
            runtime_name: NAME.into(),
            runtime_version: VERSION.into(),
        };
        let socket = connections.then_some(socket);
        enabled.then_some(NriConfig { socket, settings })
    })
}

/// For people.
pub(super) fn summary(config: Option<&NriConfig>) -> serde_json::Value {
    let Some(NriConfig { socket, settings }) = config else {
        return serde_json::json!({ "enabled": false });
    };
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    serde_json::json!({
        "enabled": true,
        "socket": path(socket),
        "pluginDir": path(&settings.plugin_dir),
        "pluginConfigDir": settings.plugin_config_dir,
        "registrationTimeoutSeconds": settings.registration_timeout.as_secs(),
        "requestTimeoutSeconds": settings.request_timeout.as_secs(),
    })
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, Overrides};

    fn from(text: &str) -> Result<Config, Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        std::fs::write(&file, text).unwrap();
        Config::load(Some(&file), &Overrides::default()).map_err(|problems| problems.0)
    }

    #[test]
    fn what_the_page_shows_is_the_default_and_every_key() {
        let page = include_str!("../../../docs/nri.md");
        let block = page.split("```toml\n").nth(1).unwrap();
        let block = block.split("```").next().unwrap();
        let shown = from(block).unwrap().nri.unwrap();
        let default = from("").unwrap().nri.unwrap();
        assert_eq!(format!("{shown:?}"), format!("{default:?}"));
        for key in [
            "enabled",
            "connections",
            "socket",
            "plugin_dir",
            "plugin_config_dir",
            "registration_timeout_seconds",
            "request_timeout_seconds",
        ] {
            let line = format!("\n{key} = ");
            assert!(block.contains(&line), "{key} is not on the page");
        }
    }

    #[test]
    fn it_can_be_switched_off_whole_or_without_its_socket() {
        assert!(from("[nri]\nenabled = false").unwrap().nri.is_none());
        let installed = from("[nri]\nconnections = false\nplugin_dir = \"/p\"")
            .unwrap()
            .nri
            .unwrap();
        assert_eq!(installed.socket, None);
        assert!(from("[nri]\nenabled = 1\nrequest_timeout_seconds = 0\nsocket = \"x\"").is_err());
    }
}
