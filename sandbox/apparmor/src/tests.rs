//! Profiles in a kernel that is a directory, and in files that the real compiler reads.

use std::{fs, os::unix::fs::symlink};

use super::*;

/// What both guest kernels can do, as far as the default profile is compiled for it.
const FEATURES: &str = include_str!("../../../guest/apparmor/features");

struct Node {
    dir: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("files")).unwrap();
        Self { dir }
    }

    fn profiles(&self) -> Profiles {
        Profiles::new(Settings {
            directory: self.dir.path().join("files"),
            parser: None,
            kernel: self.dir.path().join("kernel"),
        })
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join("files").join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// A profile that the kernel has; `policy` as it was loaded, unless it keeps none.
    fn load(&self, directory: &str, name: &str, policy: Option<&[u8]>) {
        let profile = self.dir.path().join("kernel/policy/profiles").join(directory);
        fs::create_dir_all(&profile).unwrap();
        fs::write(profile.join("name"), format!("{name}\n")).unwrap();
        if let Some(policy) = policy {
            let raw = self.dir.path().join("kernel/policy/raw_data").join(directory);
            fs::create_dir_all(&raw).unwrap();
            fs::write(raw.join("raw_data"), policy).unwrap();
            symlink(
                format!("../../raw_data/{directory}/raw_data"),
                profile.join("raw_data"),
            )
            .unwrap();
        }
    }
}

#[tokio::test]
async fn a_loaded_profile_is_had_as_it_was_loaded_and_by_its_whole_name() {
    let node = Node::new();
    node.load("usr.bin.x.1", "/usr/bin/x", Some(b"x"));
    node.load("deny.7", "deny", Some(b"policy"));
    let profiles = node.profiles();
    for (name, policy) in [
        ("deny", b"policy".as_slice()),
        ("/usr/bin/x", b"x"),
        ("deny//hat", b"policy"),
    ] {
        assert_eq!(profiles.find(name).await.unwrap(), Found::Loaded(policy.to_vec()));
    }
    for unknown in ["den", "deny.7", "x"] {
        let error = profiles.find(unknown).await.unwrap_err();
        assert!(
            error
                .to_string()
                .contains("neither loaded on the host nor in a file"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_kernel_that_keeps_no_policy_is_named_as_the_reason() {
    let node = Node::new();
    node.load("deny.7", "deny", None);
    let error = node.profiles().find("deny").await.unwrap_err().to_string();
    assert!(error.contains("has it without its policy"), "{error}");
    assert!(error.contains("\"deny\""), "{error}");
}

#[tokio::test]
async fn what_is_larger_than_policy_can_be_is_refused() {
    let node = Node::new();
    let large = vec![0; usize::try_from(MAX_POLICY_BYTES).unwrap() + 1];
    node.load("large.1", "large", Some(&large));
    let error = node.profiles().find("large").await.unwrap_err();
    assert!(matches!(error, ProfileError::TooLarge { .. }), "{error}");
}

#[tokio::test]
async fn a_profile_in_a_file_of_any_name_is_compiled_for_the_guest() {
    let node = Node::new();
    node.file("a", "# deny-write is elsewhere\nprofile other { file, }\n");
    let file = node.file("of-the-team", "profile deny-write { file, deny /** w, }\n");
    node.file("of-the-team~", "profile deny-write { }\n");
    let profiles = node.profiles();
    assert_eq!(
        profiles.find("deny-write").await.unwrap(),
        Found::File(file.clone())
    );
    let policy = profiles.compile("deny-write", &file, FEATURES).await.unwrap();
    assert!(policy.windows(11).any(|window| window == b"deny-write\0"));
    assert!(
        matches!(
            profiles.find("deny").await,
            Err(ProfileError::Unknown { withheld: false, .. })
        ),
        "a part of a name is no name"
    );
}

#[tokio::test]
async fn a_name_is_no_path() {
    let node = Node::new();
    fs::write(node.dir.path().join("outside"), "profile outside { }\n").unwrap();
    let profiles = node.profiles();
    for name in ["../outside", "outside", "/etc/passwd", "..", "."] {
        let error = profiles.find(name).await.unwrap_err();
        assert!(matches!(error, ProfileError::Unknown { .. }), "{name}: {error}");
    }
    for name in ["", "a\nb", ":ns:x", &"x".repeat(1025)] {
        let error = profiles.find(name).await.unwrap_err();
        assert!(matches!(error, ProfileError::Name { .. }), "{name}: {error}");
    }
}

#[tokio::test]
async fn the_compiler_s_complaint_is_passed_on() {
    let node = Node::new();
    node.file("broken", "profile broken { nonsense, }\n");
    let error = node.profiles().find("broken").await.unwrap_err().to_string();
    assert!(
        error.contains("\"broken\"") && error.contains("syntax error"),
        "{error}"
    );
    let whole = node.file("whole", "profile broken { file, }\n");
    assert_eq!(node.profiles().find("broken").await.unwrap(), Found::File(whole));
}

#[tokio::test]
async fn without_a_compiler_a_file_is_named_with_what_is_missing() {
    let node = Node::new();
    let file = node.file("mine", "profile mine { file, }\n");
    let profiles = Profiles::new(Settings {
        parser: Some("/nonexistent/apparmor_parser".into()),
        ..node.profiles().settings
    });
    let error = profiles.find("mine").await.unwrap_err().to_string();
    assert!(
        error.contains(&file.display().to_string()) && error.contains("no apparmor_parser"),
        "{error}"
    );
}
