//! A CNI plugin for tests: writes down how it was called, then behaves as its configuration says.
//!
//! `log`: file that gets a line of JSON for each call. `behaviour`: what to do by command: `answer` (the default: `result` of the
//! configuration, else the previous result), `refuse`, `hang`, `garbage`, `flood`, `crash`, `nothing`.

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io::{Read, Write},
    process::{Command, exit},
    time::Duration,
};

use cni_plugin::{Cni, config::NetworkConfig};
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let command = std::env::var("CNI_COMMAND")?;
    if command == "STATUS" {
        // Younger than the crate.
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text)?;
        let config: Value = serde_json::from_str(&text)?;
        return behave(&command, &config);
    }
    let config: NetworkConfig = match Cni::load() {
        Cni::Add { config, .. } | Cni::Del { config, .. } | Cni::Check { config, .. } => config,
        Cni::Version(_) => return Ok(()),
    };
    behave(&command, &serde_json::to_value(config)?)
}

fn behave(command: &str, config: &Value) -> Result<(), Box<dyn std::error::Error>> {
    let behaviour = config["behaviour"][command].as_str().unwrap_or("answer");
    // A child that would live on if only the plugin itself were killed.
    let child = if behaviour == "hang" {
        Some(Command::new("sleep").arg("1000").spawn()?.id())
    } else {
        None
    };
    if let Some(path) = config["log"].as_str() {
        let environment: BTreeMap<String, String> = std::env::vars().collect();
        let line =
            json!({ "command": command, "environment": environment, "config": config, "child": child });
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)?
            .write_all(format!("{line}\n").as_bytes())?;
    }
    let version = &config["cniVersion"];
    match behaviour {
        "refuse" => {
            let error = json!({ "cniVersion": version, "code": 101, "msg": "no more addresses", "details": "tried all" });
            println!("{error}");
            exit(1);
        }
        "hang" => loop {
            std::thread::sleep(Duration::from_secs(1000));
        },
        "garbage" => println!("this is no JSON"),
        "flood" => loop {
            std::io::stdout().write_all(&[b'x'; 65536])?;
        },
        "crash" => std::process::abort(),
        "nothing" => {}
        _ if command == "ADD" => {
            let result = [&config["result"], &config["prevResult"]]
                .into_iter()
                .find(|value| value.is_object());
            println!(
                "{}",
                result
                    .cloned()
                    .unwrap_or_else(|| json!({ "cniVersion": version }))
            );
        }
        _ => {}
    }
    Ok(())
}
