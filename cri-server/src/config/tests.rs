//! What configurations come to, and what is said of wrong ones.

use caisson_image::SignatureRule;

use super::*;

fn from(text: &str, overrides: &Overrides) -> Result<Config, Vec<String>> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    std::fs::write(&file, text).unwrap();
    Config::load(Some(&file), overrides).map_err(|problems| problems.0)
}

#[test]
fn an_empty_file_gives_the_documented_defaults() {
    let config = from("", &Overrides::default()).unwrap();
    assert_eq!(config.daemon.root, Path::new("/var/lib/caisson"));
    assert_eq!(config.daemon.socket, Path::new("/run/caisson/caisson.sock"));
    assert_eq!(
        config.guest.initramfs,
        Path::new("/usr/lib/caisson/guest/initramfs.cpio")
    );
    assert_eq!(config.network.cache_dir, Path::new("/var/lib/caisson/cni"));
    assert_eq!(config.network.netns_dir, Path::new("/run/caisson/netns"));
    assert_eq!(config.streaming.listen.to_string(), "127.0.0.1:0");
    assert_eq!(config.streaming.tls, None);
    let nri = config.nri.as_ref().unwrap();
    assert_eq!(nri.socket.as_deref(), Some(Path::new(DEFAULT_NRI_SOCKET)));
    let nri = &nri.settings;
    assert_eq!(nri.plugin_dir.as_deref(), Some(Path::new("/opt/nri/plugins")));
    assert_eq!(nri.plugin_config_dir, Path::new("/etc/nri/conf.d"));
    assert_eq!(
        (nri.registration_timeout.as_secs(), nri.request_timeout.as_secs()),
        (5, 2)
    );
    assert_eq!(
        config.network.plugin_dirs,
        [Path::new("/opt/cni/bin"), Path::new("/usr/lib/cni")]
    );
    assert_eq!(config.images.root, Path::new("/var/lib/caisson/images"));
    assert_eq!(config.hypervisor.driver, Driver::Auto);
    assert_eq!(config.hypervisor.user, VmUser::PerVm { base: 2_100_000_000 });
    assert_eq!(config.sandboxes().scratch_bytes, 10 << 30);
    assert_eq!(config.apparmor.directory, Path::new("/etc/apparmor.d"));
    assert_eq!(config.apparmor.parser, None);
}

#[test]
fn every_key_has_its_effect() {
    let config = from(
        r#"
        root = "/r"
        run_dir = "/n"
        listen = "unix:///n/x.sock"
        log = "debug"
        cgroup_driver = "cgroupfs"
        [guest]
        kernel = "/k"
        initramfs = "/i"
        cmdline = ["a=b"]
        [vm]
        default_memory_mib = 256
        default_vcpus = 2
        guest_overhead_mib = 32
        host_reserve_mib = 64
        scratch_mib = 100
        attach_slots = 3
        boot_deadline_seconds = 5
        agent_deadline_seconds = 6
        [hypervisor]
        driver = "qemu"
        accelerator = "tcg"
        qemu = "/q"
        vsock_backend = "/v"
        user = "65534:65533"
        huge_pages = true
        [apparmor]
        profile_dir = "/aa"
        parser = "/ap"
        [network]
        plugin_dirs = ["/p"]
        conf_dir = "/c"
        cache_dir = "/cc"
        netns_dir = "/ns"
        plugin_deadline_seconds = 7
        [images]
        root = "/im"
        insecure_registries = ["127.0.0.1:5000"]
        ca_files = ["/ca.pem"]
        max_image_mib = 10
        stall_deadline_seconds = 8
        hosts_dirs = ["/certs.d"]
        auth_files = ["/root/.docker/config.json"]
        [images.mirrors]
        "registry.k8s.io" = ["127.0.0.1:5000"]
        [images.signatures."*"]
        policy = "reject"
        [images.signatures."r.example/team"]
        policy = "cosign"
        keys = ["/etc/caisson/team.pub"]
        "#,
        &Overrides::default(),
    )
    .unwrap();
    assert_eq!(config.daemon.socket, Path::new("/n/x.sock"));
    assert_eq!(config.guest.cmdline, ["a=b"]);
    assert_eq!(config.vm.attach_slots, 3);
    assert_eq!(config.hypervisor.accelerator, Accelerator::Tcg);
    assert!(config.hypervisor.huge_pages);
    assert_eq!(
        config.hypervisor.user,
        VmUser::Fixed {
            uid: 65534,
            gid: 65533
        }
    );
    assert_eq!(config.network.plugin_deadline, Duration::from_secs(7));
    assert_eq!(config.apparmor.directory, Path::new("/aa"));
    assert_eq!(config.apparmor.parser.as_deref(), Some(Path::new("/ap")));
    assert_eq!(config.images.max_image_bytes, 10 << 20);
    assert_eq!(config.images.mirrors["registry.k8s.io"], ["127.0.0.1:5000"]);
    assert_eq!(config.images.hosts_dirs, [Path::new("/certs.d")]);
    assert_eq!(config.images.auth_files, [Path::new("/root/.docker/config.json")]);
    assert_eq!(config.images.signatures["*"], SignatureRule::Reject);
    assert_eq!(
        config.images.signatures["r.example/team"],
        SignatureRule::Cosign(vec!["/etc/caisson/team.pub".into()])
    );
}

#[test]
fn a_signature_rule_that_says_nothing_is_refused() {
    for (rule, told) in [
        ("", "policy: is missing"),
        ("policy = 'sigstore'", "\"sigstore\" is not one of"),
        ("policy = 'cosign'", "keys: a rule with cosign needs"),
        ("policy = 'accept'\nkeys = ['/k']", "keys: has an effect"),
        ("policy = 'cosign'\nkeys = ['k']", "not an absolute path"),
    ] {
        let text = format!("[images.signatures.'r.example']\n{rule}");
        let problems = from(&text, &Overrides::default()).unwrap_err();
        assert!(problems[0].contains(told), "{rule}: {problems:?}");
    }
}

#[test]
fn every_problem_is_told_at_once_with_its_place() {
    let problems = from(
        r#"
        root = "relative"
        colour = "blue"
        cgroup_driver = "upstart"
        log = "a=b=c"
        [vm]
        default_vcpus = 0
        default_memory_mib = "much"
        speed = 9
        [hypervisor]
        driver = "magic"
        user = "caisson-vm"
        [network]
        plugin_dirs = "one"
        [images.mirrors]
        "docker.io" = [1]
        [streaming]
        listen = "localhost"
        tls_key_file = "/key.pem"
        "#,
        &Overrides::default(),
    )
    .unwrap_err();
    for key in [
        "root:",
        "colour:",
        "cgroup_driver:",
        "log:",
        "vm.default_vcpus:",
        "vm.default_memory_mib:",
        "vm.speed:",
        "hypervisor.driver:",
        "hypervisor.user:",
        "network.plugin_dirs:",
        "images.mirrors.\"docker.io\":",
        "streaming.listen:",
        "streaming.tls_key_file:",
    ] {
        let told = problems
            .iter()
            .filter(|problem| problem.contains(&format!(" {key}")))
            .count();
        assert_eq!(told, 1, "{key} in {problems:#?}");
    }
    assert_eq!(problems.len(), 13, "{problems:#?}");
    assert!(problems.iter().all(|problem| problem.contains("config.toml")));
}

#[test]
fn vms_are_users_of_their_own_one_user_or_root_and_nothing_by_accident() {
    let user = |lines: &str| {
        from(&format!("[hypervisor]\n{lines}"), &Overrides::default()).map(|config| config.hypervisor.user)
    };
    assert_eq!(user("user = \"per-vm\"").unwrap(), VmUser::default());
    assert_eq!(
        user("uid_base = 100000").unwrap(),
        VmUser::PerVm { base: 100_000 }
    );
    assert_eq!(user("user = \"root\"").unwrap(), VmUser::Daemon);
    for (lines, told) in [
        ("user = \"0:0\"", "write \"root\""),
        ("user = \"997:0\"", "write \"root\""),
        (
            "user = \"997\"",
            "neither \"per-vm\", uid:gid in numbers nor \"root\"",
        ),
        ("user = \"4294967295:1\"", "neither"),
        ("user = \"Root\"", "neither"),
        ("user = 997", "must be a string"),
        ("uid_base = 0", "from 65536 to 2147418112"),
        ("uid_base = 2147418113", "from 65536 to 2147418112"),
        (
            "user = \"root\"\nuid_base = 100000",
            "hypervisor.uid_base: has no effect",
        ),
        (
            "user = \"7:7\"\nuid_base = 100000",
            "hypervisor.uid_base: has no effect",
        ),
    ] {
        let problems = user(lines).unwrap_err();
        assert!(
            problems.len() == 1 && problems[0].contains(told),
            "{lines}: {problems:?}"
        );
    }
}

#[test]
fn drop_ins_win_key_by_key_in_lexical_order() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    std::fs::create_dir(dir.path().join("config.d")).unwrap();
    std::fs::write(&file, "[vm]\ndefault_vcpus = 2\nattach_slots = 2\n").unwrap();
    std::fs::write(dir.path().join("config.d/10.toml"), "[vm]\nattach_slots = 3\n").unwrap();
    std::fs::write(dir.path().join("config.d/20.toml"), "[vm]\nattach_slots = 4\n").unwrap();
    std::fs::write(dir.path().join("config.d/readme"), "not toml").unwrap();
    let config = Config::load(Some(&file), &Overrides::default()).unwrap();
    assert_eq!((config.vm.default_vcpus, config.vm.attach_slots), (2, 4));

    std::fs::write(dir.path().join("config.d/30.toml"), "[vm]\nattach_slots = -1\n").unwrap();
    std::fs::write(dir.path().join("config.d/40.toml"), "[vm\n").unwrap();
    let problems = Config::load(Some(&file), &Overrides::default()).unwrap_err().0;
    assert_eq!(problems.len(), 2, "{problems:#?}");
    assert!(
        problems
            .iter()
            .any(|problem| problem.contains("30.toml") && problem.contains("attach_slots"))
    );
    assert!(problems.iter().any(|problem| problem.contains("40.toml")));
}

#[test]
fn flags_win_over_files_and_are_named_when_wrong() {
    let overrides = Overrides {
        root: Some("/flag".into()),
        listen: Some("unix:///flag.sock".into()),
        cni_bin_dir: vec!["/b1".into(), "/b2".into()],
        insecure_registry: vec!["r:5000".into()],
        ..Default::default()
    };
    let config = from("root = \"/file\"", &overrides).unwrap();
    assert_eq!(config.daemon.root, Path::new("/flag"));
    assert_eq!(config.daemon.socket, Path::new("/flag.sock"));
    assert_eq!(config.network.plugin_dirs.len(), 2);
    assert_eq!(config.images.insecure_registries, ["r:5000"]);

    let wrong = Overrides {
        hypervisor: Some("xen".into()),
        ..Default::default()
    };
    let problems = from("", &wrong).unwrap_err();
    assert!(
        problems[0].contains("--hypervisor") && problems[0].contains("\"xen\""),
        "{problems:?}"
    );
}

#[test]
fn relative_paths_of_flags_start_at_the_working_directory() {
    let overrides = Overrides {
        root: Some("here".into()),
        ..Default::default()
    };
    let config = from("", &overrides).unwrap();
    assert_eq!(config.daemon.root, std::env::current_dir().unwrap().join("here"));
}

#[test]
fn a_named_file_must_exist() {
    let problems = Config::load(Some(Path::new("/nonexistent/config.toml")), &Overrides::default())
        .unwrap_err()
        .0;
    assert!(problems[0].contains("/nonexistent/config.toml"));
}
