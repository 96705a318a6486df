//! Downloads the Debian packages that test images are made of, for tests that run where no archive is reached (`tests/e2e/node`).

fn main() -> anyhow::Result<()> {
    caisson_e2e::image::fetch_packages()
}
