//! Loads the modules that a distribution kernel needs, in the order that the initramfs builder wrote down.
//!
//! The tuned kernel has no modules and no order file. Must not resolve dependencies: the order is the builder's work.

use std::{fs, io, path::Path};

use crate::error::{AgentError, At};

/// Where the builder writes the paths, one a line, dependencies first.
pub(crate) const ORDER_FILE: &str = "/lib/modules/caisson.order";

/// The paths in an order file. Empty lines and lines that begin with `#` say nothing.
fn paths(order: &str) -> Vec<String> {
    order
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| {
            if line.starts_with('/') {
                line.to_owned()
            } else {
                format!("/lib/modules/{line}")
            }
        })
        .collect()
}

/// Loads all modules of `order_file`; the number loaded. No file means a kernel without modules.
pub(crate) fn load(order_file: &Path) -> Result<usize, AgentError> {
    let order = match fs::read_to_string(order_file) {
        Ok(order) => order,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error).at(|| format!("reading {}", order_file.display())),
    };
    let paths = paths(&order);
    paths.iter().try_for_each(|path| load_one(Path::new(path)))?;
    Ok(paths.len())
}

/// Loads one module; fine when it is loaded already.
fn load_one(path: &Path) -> Result<(), AgentError> {
    let file = fs::File::open(path).at(|| format!("opening kernel module {}", path.display()))?;
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error).at(|| format!("loading kernel module {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_kept_and_comments_are_skipped() {
        let order = "# by guest/\n/lib/modules/6.12/a.ko\n\n  6.12/b.ko  \n";
        assert_eq!(paths(order), ["/lib/modules/6.12/a.ko", "/lib/modules/6.12/b.ko"]);
    }

    #[test]
    fn a_kernel_without_an_order_file_has_no_modules_to_load() {
        assert_eq!(load(Path::new("/nonexistent/caisson.order")).unwrap(), 0);
    }

    #[test]
    fn a_missing_module_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let order = dir.path().join("order");
        fs::write(&order, "/nonexistent/virtio.ko\n").unwrap();
        assert_eq!(
            load(&order).unwrap_err().to_string(),
            "opening kernel module /nonexistent/virtio.ko"
        );
    }
}
