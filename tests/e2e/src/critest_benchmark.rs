//! critest's benchmarks: how many it makes of each, and its samples as a table.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::figures::quantile;

/// What critest reads as `-benchmarking-params-file`: twenty of each, one at a time.
pub const PARAMETERS: &str = "\
containersNumber: 20
containersNumberParallel: 1
containerBenchmarkTimeoutSeconds: 600
podsNumber: 20
podsNumberParallel: 1
podBenchmarkTimeoutSeconds: 900
imagesNumber: 20
imagesNumberParallel: 1
imageBenchmarkTimeoutSeconds: 600
imagePullingBenchmarkImage: gcr.io/k8s-staging-cri-tools/test-image-1:latest
imageListingBenchmarkImages:
  - gcr.io/k8s-staging-cri-tools/test-image-1:latest
  - gcr.io/k8s-staging-cri-tools/test-image-2:latest
  - gcr.io/k8s-staging-cri-tools/test-image-3:latest
podContainerStartBenchmarkTimeoutSeconds: 600
";

/// Every operation of every file that critest has left in this directory, in milliseconds.
pub fn table(directory: &Path) -> Result<String> {
    let mut files: Vec<_> = fs::read_dir(directory)?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    let mut table = String::from(
        "| benchmark | operation | samples | min ms | median ms | max ms |\n|---|---|---:|---:|---:|---:|\n",
    );
    for file in files {
        let results: Value = serde_json::from_slice(&fs::read(&file)?)
            .with_context(|| format!("{} is no results of critest", file.display()))?;
        let name = file
            .file_stem()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let name = name.trim_end_matches("_benchmark_data").replace('_', " ");
        let operations = results["operationsNames"].as_array().context("no operations")?;
        let points = results["datapoints"].as_array().context("no datapoints")?;
        for (at, operation) in operations.iter().enumerate() {
            let samples: Vec<f64> = points
                .iter()
                .filter_map(|point| point["operationsDurationsNs"][at].as_f64())
                .map(|nanoseconds| nanoseconds / 1e6)
                .collect();
            table += &format!(
                "| {name} | {} | {} | {:.1} | {:.1} | {:.1} |\n",
                operation.as_str().unwrap_or_default(),
                samples.len(),
                quantile(&samples, 0.0),
                quantile(&samples, 0.5),
                quantile(&samples, 1.0)
            );
        }
    }
    Ok(table)
}
