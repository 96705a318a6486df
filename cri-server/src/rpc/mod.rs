//! The CRI's methods, one file each; [`service`] joins them to the generated servers.
//!
//! A handler translates, asks one of the rooms, and translates back. It holds no state: tonic drops it when the client goes away, and
//! what it had asked for goes on.

pub mod service;

mod admin_images;
mod attach;
mod checkpoint_container;
mod container_stats;
mod container_status;
mod create_container;
mod exec;
mod exec_sync;
mod get_container_events;
mod image_fs_info;
mod image_status;
mod list_container_stats;
mod list_containers;
mod list_images;
mod list_metric_descriptors;
mod list_pod_sandbox;
mod list_pod_sandbox_metrics;
mod list_pod_sandbox_stats;
mod pod_sandbox_stats;
mod pod_sandbox_status;
mod port_forward;
mod pull_image;
mod remove_container;
mod remove_image;
mod remove_pod_sandbox;
mod reopen_container_log;
mod run_pod_sandbox;
mod runtime_config;
mod start_container;
mod status;
mod stop_container;
mod stop_pod_sandbox;
mod stream_lists;
mod update_container_resources;
mod update_pod_sandbox_resources;
mod update_runtime_config;
mod version;
