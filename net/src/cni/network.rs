//! A network's plugins as a whole: ADD in order, DEL in reverse, STATUS.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{
    conflist::{ConfList, Plugin, WITH_STATUS},
    execute::{self, Environment, quote},
};
use crate::error::{Execution, NetError};

/// Runtime configuration by capability; a plugin gets those that it declares.
pub(crate) type Capabilities = Map<String, Value>;

impl ConfList {
    /// The plugins' executables, in order.
    pub(crate) fn executables(&self, plugin_dirs: &[PathBuf]) -> Result<Vec<PathBuf>, NetError> {
        self.plugins
            .iter()
            .map(|plugin| self.executable(plugin, plugin_dirs))
            .collect()
    }

    fn executable(&self, plugin: &Plugin, plugin_dirs: &[PathBuf]) -> Result<PathBuf, NetError> {
        execute::find(plugin_dirs, &plugin.kind).ok_or_else(|| NetError::PluginMissing {
            plugin: plugin.kind.clone(),
            network: self.name.clone(),
            directories: plugin_dirs.to_owned(),
        })
    }

    /// Adds the container; answers the last plugin's result. On failure nothing is undone.
    pub(crate) async fn add(
        &self,
        environment: &Environment,
        capabilities: &Capabilities,
    ) -> Result<Value, NetError> {
        // A missing plugin is told before the first one has allocated something.
        let executables = self.executables(&environment.plugin_dirs)?;
        let mut result = None;
        for (plugin, path) in self.plugins.iter().zip(executables) {
            let input = self.input(plugin, capabilities, result.as_ref());
            let execution = self.execution(plugin, "ADD");
            let output = execute::run(&path, execution.clone(), environment, &input).await?;
            result = Some(self.read_result(execution, &output)?);
        }
        Ok(result.unwrap_or_default())
    }

    /// Deletes the container from all plugins, the last first; a failing one does not stop the others.
    pub(crate) async fn del(
        &self,
        environment: &Environment,
        capabilities: &Capabilities,
        result: Option<&Value>,
    ) -> Vec<NetError> {
        let mut failures = Vec::new();
        for plugin in self.plugins.iter().rev() {
            let path = match self.executable(plugin, &environment.plugin_dirs) {
                Ok(path) => path,
                Err(error) => {
                    failures.push(error);
                    continue;
                }
            };
            let input = self.input(plugin, capabilities, result);
            if let Err(error) = execute::run(&path, self.execution(plugin, "DEL"), environment, &input).await
            {
                failures.push(error);
            }
        }
        failures
    }

    /// Asks each plugin whether it could add a container now; networks before 1.1.0 have no such question.
    pub(crate) async fn status(&self, environment: &Environment) -> Result<(), NetError> {
        let executables = self.executables(&environment.plugin_dirs)?;
        if self.version < WITH_STATUS {
            return Ok(());
        }
        for (plugin, path) in self.plugins.iter().zip(executables) {
            let input = self.input(plugin, &Capabilities::new(), None);
            execute::run(&path, self.execution(plugin, "STATUS"), environment, &input).await?;
        }
        Ok(())
    }

    fn execution(&self, plugin: &Plugin, command: &'static str) -> Execution {
        Execution {
            plugin: plugin.kind.clone(),
            command,
            network: self.name.clone(),
        }
    }

    /// What a plugin reads: its configuration with what the list and the runtime add to it.
    fn input(&self, plugin: &Plugin, capabilities: &Capabilities, result: Option<&Value>) -> Value {
        let mut input = plugin.conf.clone();
        input.remove("capabilities");
        input.insert("name".to_owned(), self.name.clone().into());
        input.insert("cniVersion".to_owned(), self.cni_version.clone().into());
        let wanted: Map<String, Value> = capabilities
            .iter()
            .filter(|(name, _)| plugin.has_capability(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !wanted.is_empty() {
            input.insert("runtimeConfig".to_owned(), Value::Object(wanted));
        }
        if let Some(result) = result {
            input.insert("prevResult".to_owned(), result.clone());
        }
        Value::Object(input)
    }

    /// A result is kept as it is, except that it always says its version: plugins refuse a `prevResult` without.
    fn read_result(&self, execution: Execution, output: &[u8]) -> Result<Value, NetError> {
        match serde_json::from_slice(output) {
            Ok(Value::Object(mut result)) => {
                result
                    .entry("cniVersion")
                    .or_insert_with(|| self.cni_version.clone().into());
                Ok(Value::Object(result))
            }
            _ => {
                let problem = format!("succeeded, but its answer is no CNI result: {:?}", quote(output));
                Err(NetError::PluginBroken { execution, problem })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cni::conflist::parse;

    #[test]
    fn a_plugin_reads_its_configuration_and_only_the_capabilities_that_it_declares() {
        let list = parse(
            r#"{"cniVersion":"1.0.0","name":"n","plugins":[
                {"type":"a","x":1,"capabilities":{"portMappings":true,"bandwidth":false}},{"type":"b"}]}"#,
        )
        .unwrap();
        let Value::Object(capabilities) = json!({ "portMappings": [], "bandwidth": {}, "cgroupPath": "/p" })
        else {
            unreachable!()
        };
        assert_eq!(
            list.input(&list.plugins[0], &capabilities, None),
            json!({ "cniVersion": "1.0.0", "name": "n", "type": "a", "x": 1, "runtimeConfig": { "portMappings": [] } })
        );
        assert_eq!(
            list.input(&list.plugins[1], &capabilities, Some(&json!({ "ips": [] }))),
            json!({ "cniVersion": "1.0.0", "name": "n", "type": "b", "prevResult": { "ips": [] } })
        );
    }
}
