//! What a container runs: arguments, environment, directory and user, out of the request and the image.

use caisson_cri_api::v1;
use caisson_image::ImageConfig;
use caisson_sandbox::guest;

use super::{Refusals, capabilities, seccomp, security};

/// PATH when neither request nor image has one.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Open files: what systemd gives a service, whatever the guest's init inherited.
const NOFILE: (u64, u64) = (1024, 524_288);

/// The container's first process.
pub(super) fn process(
    config: &v1::ContainerConfig,
    context: &v1::LinuxContainerSecurityContext,
    image: &ImageConfig,
    hostname: &str,
    oom_score_adj: i32,
    refusals: &mut Refusals,
) -> guest::Process {
    let capabilities = capabilities::capabilities(
        context.capabilities.as_ref(),
        context.privileged,
        "config.linux.security_context.capabilities",
        refusals,
    );
    guest::Process {
        seccomp: seccomp::filter(context, &capabilities.bounding, refusals),
        apparmor: security::apparmor(context, refusals),
        args: args(&config.command, &config.args, image, refusals),
        env: env(&config.envs, image, hostname, config.tty, refusals),
        cwd: cwd(&config.working_dir, image, refusals),
        user: Some(user(context, image, refusals)),
        capabilities: Some(capabilities),
        no_new_privileges: context.no_new_privs,
        terminal: config.tty,
        rlimits: vec![guest::Rlimit {
            r#type: "RLIMIT_NOFILE".into(),
            soft: NOFILE.0,
            hard: NOFILE.1,
        }],
        oom_score_adj,
    }
}

/// `command` replaces the image's entrypoint and drops its cmd; `args` replaces the cmd.
fn args(command: &[String], args: &[String], image: &ImageConfig, refusals: &mut Refusals) -> Vec<Vec<u8>> {
    let entrypoint = if command.is_empty() {
        &image.entrypoint
    } else {
        command
    };
    let arguments = if args.is_empty() && command.is_empty() {
        &image.cmd
    } else {
        args
    };
    let all: Vec<Vec<u8>> = entrypoint
        .iter()
        .chain(arguments)
        .map(|word| word.clone().into_bytes())
        .collect();
    match all.first() {
        None => refusals.add(
            "config.command",
            "no command specified, and the image has neither entrypoint nor cmd",
        ),
        Some(first) if first.is_empty() => refusals.add("config.command[0]", "is empty"),
        Some(_) => {}
    }
    refusals.add_if(
        all.iter().any(|word| word.contains(&0)),
        "config.command",
        "has a NUL byte in an argument",
    );
    all
}

/// Defaults, then the image's, then the request's; a later value takes the place of an earlier one of the same name.
fn env(
    envs: &[v1::KeyValue],
    image: &ImageConfig,
    hostname: &str,
    tty: bool,
    refusals: &mut Refusals,
) -> Vec<Vec<u8>> {
    let mut all: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut set = |key: &[u8], value: &[u8]| match all.iter_mut().find(|(known, _)| known == key) {
        Some(entry) => entry.1 = value.to_vec(),
        None => all.push((key.to_vec(), value.to_vec())),
    };
    set(b"PATH", DEFAULT_PATH.as_bytes());
    set(b"HOSTNAME", hostname.as_bytes());
    if tty {
        set(b"TERM", b"xterm");
    }
    for text in &image.env {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        if !key.is_empty() {
            set(key.as_bytes(), value.as_bytes());
        }
    }
    for (index, v1::KeyValue { key, value }) in envs.iter().enumerate() {
        if key.is_empty() || key.contains(['=', '\0']) {
            refusals.add(
                format!("config.envs[{index}].key"),
                format!("{key:?} is not a name"),
            );
        } else if value.contains(&0) {
            refusals.add(format!("config.envs[{index}].value"), "has a NUL byte");
        } else {
            set(key.as_bytes(), value);
        }
    }
    all.into_iter()
        .map(|(key, value)| [key.as_slice(), b"=", value.as_slice()].concat())
        .collect()
}

fn cwd(wanted: &str, image: &ImageConfig, refusals: &mut Refusals) -> String {
    if !wanted.is_empty() {
        refusals.add_if(
            !wanted.starts_with('/'),
            "config.working_dir",
            "is not an absolute path",
        );
        return wanted.to_owned();
    }
    if image.working_dir.starts_with('/') {
        image.working_dir.clone()
    } else {
        // Docker reads a relative WorkingDir from the root.
        format!("/{}", image.working_dir)
    }
}

fn user(
    context: &v1::LinuxContainerSecurityContext,
    image: &ImageConfig,
    refusals: &mut Refusals,
) -> guest::User {
    let field = "config.linux.security_context";
    let mut id = |name: String, value: i64| {
        let id = u32::try_from(value).ok().filter(|id| *id != u32::MAX);
        if id.is_none() {
            refusals.add(
                format!("{field}.{name}"),
                format!("{value} is not a user or group id"),
            );
        }
        id.unwrap_or_default()
    };
    let uid = context
        .run_as_user
        .as_ref()
        .map(|user| id("run_as_user".into(), user.value));
    let gid = context
        .run_as_group
        .as_ref()
        .map(|group| id("run_as_group".into(), group.value));
    let additional_gids = context
        .supplemental_groups
        .iter()
        .enumerate()
        .map(|(index, group)| id(format!("supplemental_groups[{index}]"), *group))
        .collect();
    let name = context.run_as_username.as_str();
    refusals.add_if(
        uid.is_some() && !name.is_empty(),
        &format!("{field}.run_as_username"),
        "is only possible without run_as_user",
    );
    refusals.add_if(
        gid.is_some() && uid.is_none() && name.is_empty(),
        &format!("{field}.run_as_group"),
        "needs run_as_user or run_as_username",
    );
    refusals.add_if(
        name.contains([':', '\0', '\n', '/']),
        &format!("{field}.run_as_username"),
        "is not a user name",
    );
    let policy = v1::SupplementalGroupsPolicy::try_from(context.supplemental_groups_policy);
    if policy.is_err() {
        refusals.add(
            format!("{field}.supplemental_groups_policy"),
            format!("unknown policy {}", context.supplemental_groups_policy),
        );
    }
    guest::User {
        spec: match uid {
            Some(uid) => uid.to_string(),
            None if !name.is_empty() => name.to_owned(),
            None => image.user.clone(),
        },
        gid,
        additional_gids,
        strict_supplemental_groups: policy == Ok(v1::SupplementalGroupsPolicy::Strict),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(|word| (*word).to_owned()).collect()
    }

    fn image() -> ImageConfig {
        ImageConfig {
            user: "app:staff".into(),
            env: words(&["PATH=/bin", "A=image", "ODD"]),
            entrypoint: words(&["/entry"]),
            cmd: words(&["cmd"]),
            working_dir: "srv".into(),
            ..Default::default()
        }
    }

    fn composed(command: &[&str], arguments: &[&str], image: &ImageConfig) -> Result<Vec<String>, String> {
        let mut refusals = Refusals::default();
        let all = args(&words(command), &words(arguments), image, &mut refusals);
        refusals
            .settle(
                all.into_iter()
                    .map(|word| String::from_utf8(word).unwrap())
                    .collect(),
            )
            .map_err(|refusals| refusals.to_string())
    }

    #[test]
    fn command_and_args_are_composed_as_kubernetes_documents() {
        assert_eq!(composed(&[], &[], &image()).unwrap(), ["/entry", "cmd"]);
        assert_eq!(composed(&[], &["a"], &image()).unwrap(), ["/entry", "a"]);
        assert_eq!(composed(&["c"], &[], &image()).unwrap(), ["c"]);
        assert_eq!(composed(&["c"], &["a"], &image()).unwrap(), ["c", "a"]);
        assert!(
            composed(&[], &[], &ImageConfig::default())
                .unwrap_err()
                .contains("no command specified")
        );
        assert_eq!(
            composed(&[""], &[], &image()).unwrap_err(),
            "config.command[0]: is empty"
        );
    }

    #[test]
    fn the_request_wins_over_the_image_over_the_defaults() {
        let envs = [
            v1::KeyValue {
                key: "A".into(),
                value: b"\xff".to_vec(),
            },
            v1::KeyValue {
                key: "B".into(),
                value: b"x=y".to_vec(),
            },
        ];
        let mut refusals = Refusals::default();
        let all = env(&envs, &image(), "host", true, &mut refusals);
        refusals.settle(()).unwrap();
        assert_eq!(
            all,
            [
                b"PATH=/bin".as_slice(),
                b"HOSTNAME=host",
                b"TERM=xterm",
                b"A=\xff",
                b"ODD=",
                b"B=x=y"
            ]
        );
        let wrong = [v1::KeyValue {
            key: "A=B".into(),
            value: vec![],
        }];
        let mut refusals = Refusals::default();
        env(&wrong, &image(), "host", false, &mut refusals);
        assert_eq!(refusals.to_string(), "config.envs[0].key: \"A=B\" is not a name");
    }

    #[test]
    fn the_user_is_the_requests_or_else_the_images() {
        let value = |value| Some(v1::Int64Value { value });
        let base = v1::LinuxContainerSecurityContext::default();
        let mut refusals = Refusals::default();
        assert_eq!(user(&base, &image(), &mut refusals).spec, "app:staff");
        let by_id = v1::LinuxContainerSecurityContext {
            run_as_user: value(1000),
            run_as_group: value(2000),
            supplemental_groups: vec![3000],
            supplemental_groups_policy: 1,
            ..base.clone()
        };
        let got = user(&by_id, &image(), &mut refusals);
        assert_eq!(
            (
                got.spec.as_str(),
                got.gid,
                got.additional_gids,
                got.strict_supplemental_groups
            ),
            ("1000", Some(2000), vec![3000], true)
        );
        let by_name = v1::LinuxContainerSecurityContext {
            run_as_username: "www".into(),
            ..base.clone()
        };
        assert_eq!(user(&by_name, &image(), &mut refusals).spec, "www");
        refusals.settle(()).unwrap();
    }

    #[test]
    fn a_user_that_cannot_be_is_refused() {
        let value = |value| Some(v1::Int64Value { value });
        let base = v1::LinuxContainerSecurityContext::default();
        let cases = [
            (
                v1::LinuxContainerSecurityContext {
                    run_as_user: value(-1),
                    ..base.clone()
                },
                "run_as_user: -1",
            ),
            (
                v1::LinuxContainerSecurityContext {
                    run_as_group: value(1),
                    ..base.clone()
                },
                "run_as_group: needs",
            ),
            (
                v1::LinuxContainerSecurityContext {
                    run_as_user: value(1),
                    run_as_username: "x".into(),
                    ..base.clone()
                },
                "run_as_username: is only",
            ),
            (
                v1::LinuxContainerSecurityContext {
                    supplemental_groups: vec![1, 1 << 32],
                    ..base.clone()
                },
                "supplemental_groups[1]: 4294967296",
            ),
            (
                v1::LinuxContainerSecurityContext {
                    supplemental_groups_policy: 7,
                    ..base
                },
                "supplemental_groups_policy: unknown",
            ),
        ];
        for (context, words) in cases {
            let mut refusals = Refusals::default();
            user(&context, &image(), &mut refusals);
            assert!(refusals.to_string().contains(words), "{refusals}");
        }
    }

    #[test]
    fn the_working_directory_is_absolute() {
        let mut refusals = Refusals::default();
        assert_eq!(cwd("/w", &image(), &mut refusals), "/w");
        assert_eq!(cwd("", &image(), &mut refusals), "/srv");
        assert_eq!(cwd("", &ImageConfig::default(), &mut refusals), "/");
        refusals.settle(()).unwrap();
        let mut refusals = Refusals::default();
        cwd("w", &image(), &mut refusals);
        assert!(refusals.settle(()).is_err());
    }
}
