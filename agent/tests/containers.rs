//! The agent's verbs on real containers: namespaces, mounts, cgroups and processes of this machine, in a PID, mount, network, UTS and
//! IPC namespace of their own.

mod harness;
mod vm;

use caisson_agent_api::{
    stream::{Kind, Outcome},
    v1,
};
use harness::{Agent, container, frame, process, read_until, send_frame, shell, text};
use tokio::io::AsyncWriteExt;
use tonic::Code;

/// The agent, or the end of the test.
macro_rules! agent {
    ($how:ident) => {
        match Agent::$how().await {
            Some(agent) => agent,
            None => return,
        }
    };
}

#[tokio::test]
async fn a_container_runs_and_its_words_and_exit_code_arrive() {
    let mut agent = agent!(ready);
    let (exit, stdout, stderr) = agent.run("c", shell("echo out; echo err >&2; exit 7")).await;
    assert_eq!((stdout.as_str(), stderr.as_str()), ("out\n", "err\n"));
    assert_eq!(
        (exit.exit_code, exit.signal, exit.oom_killed, exit.output_cut),
        (7, 0, false, false)
    );
    assert_eq!((exit.stdout_bytes, exit.stderr_bytes), (4, 4));
    assert!(exit.termination_message.is_none());
}

#[tokio::test]
async fn the_power_button_ends_containers_and_then_the_agent() {
    let mut agent = agent!(ready);
    let polite = "trap 'echo bye; sleep 0.5; exit 0' TERM; echo up; while :; do sleep 0.1; done";
    agent.create("c", shell(polite)).await.unwrap();
    agent.start_container("c").await.unwrap();
    agent.create("idle", shell("true")).await.unwrap();
    let (mut stdout, _) = agent.open("c", "", Kind::Stdout, 0).await;
    read_until(&mut stdout, "up").await;
    agent.press_power().await;
    read_until(&mut stdout, "bye").await;
    agent.gone().await;
}

#[tokio::test]
async fn hello_tells_who_answers_and_whether_it_is_configured() {
    let mut agent = agent!(start);
    let before = agent
        .client
        .hello(v1::HelloRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!((before.protocol, before.configured), (1, false));
    assert!(before.memory_bytes > 0 && before.online_cpus > 0 && before.agent_rss_bytes > 0);
    agent.client.configure_sandbox(harness::sandbox()).await.unwrap();
    assert!(
        agent
            .client
            .hello(v1::HelloRequest {})
            .await
            .unwrap()
            .into_inner()
            .configured
    );
}

#[tokio::test]
async fn a_sandbox_is_configured_once_and_the_same_request_again_is_no_error() {
    let mut agent = agent!(ready);
    let mut again = harness::sandbox();
    again.entropy = vec![1; 16];
    agent.client.configure_sandbox(again).await.unwrap();
    let mut other = harness::sandbox();
    other.hostname = "another".into();
    assert_eq!(
        agent.client.configure_sandbox(other).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
}

#[tokio::test]
async fn verbs_in_the_wrong_order_say_so() {
    let mut agent = agent!(start);
    assert_eq!(
        agent.create("c", shell("true")).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    agent.client.configure_sandbox(harness::sandbox()).await.unwrap();
    assert_eq!(
        agent.start_container("c").await.unwrap_err().code(),
        Code::NotFound
    );
    agent.create("c", shell("true")).await.unwrap();
    assert_eq!(
        agent.create("c", shell("true")).await.unwrap_err().code(),
        Code::AlreadyExists
    );
    let wait = v1::WaitContainerRequest {
        container_id: "c".into(),
    };
    assert_eq!(
        agent.client.wait_container(wait).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    let first = agent.start_container("c").await.unwrap();
    assert_eq!(agent.start_container("c").await.unwrap(), first);
    agent.remove("c").await;
    let remove = v1::RemoveContainerRequest {
        container_id: "c".into(),
    };
    assert_eq!(
        agent.client.remove_container(remove).await.unwrap_err().code(),
        Code::NotFound
    );
}

#[tokio::test]
async fn commands_that_cannot_run_get_the_words_users_know() {
    let mut agent = agent!(ready);
    for (number, (command, words)) in [
        ("nope", "exec: \"nope\": executable file not found in $PATH"),
        ("/nope", "exec: \"/nope\": stat /nope: no such file or directory"),
        (
            "/bin/not-executable",
            "exec: \"/bin/not-executable\": permission denied",
        ),
        ("/etc", "exec: \"/etc\": is a directory"),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("c{number}");
        agent.create(&id, container(&[command])).await.unwrap();
        let error = agent.start_container(&id).await.unwrap_err();
        assert_eq!((error.code(), error.message()), (Code::InvalidArgument, words));
        agent.remove(&id).await;
    }
    let mut spec = shell("true");
    spec.process.as_mut().unwrap().user = Some(v1::User {
        spec: "foo".into(),
        ..v1::User::default()
    });
    agent.create("user", spec).await.unwrap();
    assert_eq!(
        agent.start_container("user").await.unwrap_err().message(),
        "unable to find user foo: no matching entries in passwd file"
    );
}

#[tokio::test]
async fn a_user_by_name_has_its_groups_home_and_no_capabilities() {
    let mut agent = agent!(ready);
    let mut spec =
        shell("id -u; id -g; id -G; echo $HOME; grep -E 'Cap(Prm|Eff|Amb)|NoNewPrivs' /proc/self/status");
    let own = spec.process.as_mut().unwrap();
    own.user = Some(v1::User {
        spec: "web".into(),
        additional_gids: vec![1234],
        ..v1::User::default()
    });
    own.no_new_privileges = true;
    agent.create("c", spec).await.unwrap();
    let started = agent.start_container("c").await.unwrap();
    assert_eq!((started.uid, started.gid), (33, 34));
    assert_eq!(started.supplemental_gids, [34, 1234, 4]);
    let stdout = text(&agent.read_all("c", "", Kind::Stdout).await);
    let zero = "0000000000000000";
    assert_eq!(
        stdout,
        format!(
            "33\n34\n34 4 1234\n/home\nCapPrm:\t{zero}\nCapEff:\t{zero}\nCapAmb:\t{zero}\nNoNewPrivs:\t1\n"
        )
    );
}

#[tokio::test]
async fn a_container_sees_its_own_processes_host_name_and_file_systems_only() {
    let mut agent = agent!(ready);
    let script = "echo $$; hostname; cat /etc/hostname /etc/resolv.conf; ls /dev; cat /proc/1/cgroup; ls /; \
                  grep -c . /proc/self/mountinfo; grep -E 'CapEff|^Seccomp:' /proc/self/status";
    let (exit, stdout, stderr) = agent.run("c", shell(script)).await;
    assert_eq!(exit.exit_code, 0, "{stderr}");
    assert!(
        stdout.starts_with("1\nthe-pod\nthe-pod\nnameserver 10.96.0.10\n"),
        "{stdout}"
    );
    assert!(stdout.contains("\n0::/\n"), "{stdout}");
    assert!(stdout.contains("ptmx\npts\nrandom\nshm\nstderr\n"), "{stdout}");
    // CHOWN, DAC_OVERRIDE, KILL, SETGID, SETUID, NET_BIND_SERVICE, SYS_CHROOT, MKNOD; no profile was asked for.
    assert!(
        stdout.contains("CapEff:\t00000000080404e3\nSeccomp:\t0\n"),
        "{stdout}"
    );
    for hidden in ["\nwork\n", "\nboot\n", "\nusr\n"] {
        assert!(!stdout.contains(hidden), "{stdout}");
    }
}

#[tokio::test]
async fn mounts_of_an_image_with_hostile_links_stay_in_the_container() {
    let mut agent = agent!(ready);
    agent.put_file("v", "content").await;
    let mut spec = shell("cat /tmp/caisson-escape-test; cat /escape/caisson-escape-test");
    spec.mounts = vec![v1::Mount {
        destination: "/escape/caisson-escape-test".into(),
        readonly: true,
        source: Some(v1::mount::Source::VolumeId("v".into())),
        ..v1::Mount::default()
    }];
    let (exit, stdout, _) = agent.run("c", spec).await;
    assert_eq!((exit.exit_code, stdout.as_str()), (0, "contentcontent"));
    assert!(!std::path::Path::new("/tmp/caisson-escape-test").exists());
}

#[tokio::test]
async fn volumes_show_updates_and_readonly_ones_cannot_be_written() {
    let mut agent = agent!(ready);
    agent.put_file("v", "one").await;
    let mut spec = container(&["sleep", "1000"]);
    spec.mounts = vec![
        v1::Mount {
            destination: "/data/file".into(),
            readonly: true,
            source: Some(v1::mount::Source::VolumeId("v".into())),
            ..v1::Mount::default()
        },
        v1::Mount {
            destination: "/data".into(),
            readonly: false,
            source: Some(v1::mount::Source::Tmpfs(v1::TmpfsSource {
                size_bytes: 1 << 20,
                mode: 0o750,
            })),
            ..v1::Mount::default()
        },
    ];
    agent.create("c", spec).await.unwrap();
    agent.start_container("c").await.unwrap();
    let script = "cat /data/file; stat -c %a /data; echo x > /data/file || echo refused; echo y > /data/other && cat /data/other";
    let (_, stdout) = agent
        .exec("c", "one", process(&["sh", "-c", script]))
        .await
        .unwrap();
    assert_eq!(stdout, "one750\nrefused\ny\n");
    agent.put_file("v", "two").await;
    let (_, stdout) = agent
        .exec("c", "two", process(&["cat", "/data/file"]))
        .await
        .unwrap();
    assert_eq!(stdout, "two");
    let mut unknown = shell("true");
    unknown.mounts = vec![v1::Mount {
        destination: "/x".into(),
        readonly: false,
        source: Some(v1::mount::Source::VolumeId("nope".into())),
        ..v1::Mount::default()
    }];
    assert_eq!(
        agent.create("d", unknown).await.unwrap_err().code(),
        Code::NotFound
    );
}

#[tokio::test]
async fn a_readonly_root_keeps_its_mounts_writable_and_paths_are_masked() {
    let mut agent = agent!(ready);
    let mut spec = shell(
        "touch /x || echo ro; touch /data/x && echo rw; cat /etc/passwd; ls /seed; touch /home/x || echo ro",
    );
    spec.readonly_rootfs = true;
    spec.masked_paths = vec!["/etc/passwd".into(), "/seed".into(), "/no/such/path".into()];
    spec.readonly_paths = vec!["/home".into(), "/no/such/path".into()];
    spec.mounts = vec![v1::Mount {
        destination: "/data".into(),
        readonly: false,
        source: Some(v1::mount::Source::Tmpfs(v1::TmpfsSource::default())),
        ..v1::Mount::default()
    }];
    let (_, stdout, _) = agent.run("c", spec).await;
    assert_eq!(stdout, "ro\nrw\nro\n");
}

#[tokio::test]
async fn an_image_volume_is_seeded_and_outside_the_overlay() {
    let mut agent = agent!(ready);
    let mut spec = shell(
        "cat /seed/deep/file; grep -c ' /seed ' /proc/self/mountinfo; ls /fresh | wc -l; echo x > /fresh/x && echo ok",
    );
    spec.image_volumes = vec!["/seed".into(), "/fresh".into()];
    let (_, stdout, stderr) = agent.run("c", spec).await;
    assert_eq!(stdout, "seeded1\n0\nok\n", "{stderr}");
}

#[tokio::test]
async fn the_termination_message_is_read_at_the_end() {
    let mut agent = agent!(ready);
    let mut spec = shell("echo goodbye > /dev/termination-log");
    spec.termination_log_path = "/dev/termination-log".into();
    spec.process.as_mut().unwrap().user = Some(v1::User {
        spec: "1000".into(),
        ..v1::User::default()
    });
    let (exit, _, stderr) = agent.run("c", spec).await;
    assert_eq!(
        exit.termination_message.as_deref(),
        Some(b"goodbye\n".as_slice()),
        "{stderr}"
    );
}

#[tokio::test]
async fn signals_end_containers_with_their_number() {
    let mut agent = agent!(ready);
    agent.create("c", container(&["sleep", "1000"])).await.unwrap();
    agent.start_container("c").await.unwrap();
    for signal in [15, 9] {
        let request = v1::SignalContainerRequest {
            container_id: "c".into(),
            signal,
            all: false,
        };
        agent.client.signal_container(request).await.unwrap();
    }
    // sleep, as PID 1 of its namespace without a handler, ignores SIGTERM.
    let exit = agent.wait("c").await;
    assert_eq!((exit.exit_code, exit.signal), (137, 9));
    assert_eq!(agent.wait("c").await, exit);
}

#[tokio::test]
async fn removing_a_running_container_leaves_nothing() {
    let mut agent = agent!(ready);
    agent
        .create("c", shell("sleep 1000 & sleep 1001 & sleep 1002"))
        .await
        .unwrap();
    agent.start_container("c").await.unwrap();
    agent.remove("c").await;
    let left = agent
        .client
        .list_containers(v1::ListContainersRequest {})
        .await
        .unwrap()
        .into_inner();
    assert!(left.containers.is_empty());
    // The same id again, as nothing is in its way.
    let (exit, stdout, _) = agent.run("c", shell("ls / | wc -l; echo x > /written")).await;
    assert_eq!(exit.exit_code, 0);
    let (_, again, _) = agent.run("c", shell("ls / | wc -l")).await;
    assert_eq!(stdout, again);
}

#[tokio::test]
async fn exec_joins_the_container_and_inherits_what_it_does_not_say() {
    let mut agent = agent!(ready);
    let mut spec = container(&["sleep", "1000"]);
    let own = spec.process.as_mut().unwrap();
    own.env.push(b"COLOUR=blue".to_vec());
    own.cwd = "/work/here".into();
    own.user = Some(v1::User {
        spec: "web".into(),
        ..v1::User::default()
    });
    agent.create("c", spec).await.unwrap();
    agent.start_container("c").await.unwrap();
    let wanted = v1::Process {
        args: [
            b"sh".to_vec(),
            b"-c".to_vec(),
            b"pwd; echo $COLOUR; id -u; cat /proc/1/comm; exit 3".to_vec(),
        ]
        .into(),
        ..v1::Process::default()
    };
    let (exit, stdout) = agent.exec("c", "e", wanted.clone()).await.unwrap();
    assert_eq!(
        (exit.exit_code, stdout.as_str()),
        (3, "/work/here\nblue\n33\nsleep\n")
    );
    assert_eq!(
        agent.exec("c", "e", wanted).await.unwrap_err().code(),
        Code::AlreadyExists
    );
    let missing = agent.exec("c", "f", process(&["nope"])).await.unwrap_err();
    assert_eq!(
        missing.message(),
        "exec: \"nope\": executable file not found in $PATH"
    );
    let request = v1::RemoveExecRequest {
        container_id: "c".into(),
        exec_id: "e".into(),
    };
    agent.client.remove_exec(request).await.unwrap();
}

#[tokio::test]
async fn many_exec_sessions_at_once_all_answer() {
    let mut agent = agent!(ready);
    agent.create("c", container(&["sleep", "1000"])).await.unwrap();
    agent.start_container("c").await.unwrap();
    let client = agent.client.clone();
    let tasks: Vec<_> = (0..24)
        .map(|number| {
            let mut client = client.clone();
            tokio::spawn(async move {
                let exec_id = format!("e{number}");
                let request = v1::StartExecRequest {
                    container_id: "c".into(),
                    exec_id: exec_id.clone(),
                    process: Some(process(&["sh", "-c", &format!("echo {number}; exit {number}")])),
                    stdin: false,
                };
                client.start_exec(request).await.unwrap();
                let request = v1::WaitExecRequest {
                    container_id: "c".into(),
                    exec_id,
                };
                client.wait_exec(request).await.unwrap().into_inner().exit_code
            })
        })
        .collect();
    for (number, task) in tasks.into_iter().enumerate() {
        assert_eq!(usize::try_from(task.await.unwrap()).unwrap(), number);
        let all = agent.read_all("c", &format!("e{number}"), Kind::Stdout).await;
        assert_eq!(text(&all), format!("{number}\n"));
    }
}

#[tokio::test]
async fn an_exec_session_whose_grandchild_keeps_the_output_ends_within_a_bound() {
    let mut agent = agent!(ready);
    agent.create("c", container(&["sleep", "1000"])).await.unwrap();
    agent.start_container("c").await.unwrap();
    let (exit, stdout) = agent
        .exec("c", "e", process(&["sh", "-c", "sleep 1000 & echo done"]))
        .await
        .unwrap();
    assert_eq!(
        (stdout.as_str(), exit.exit_code, exit.output_cut),
        ("done\n", 0, true)
    );
}

#[tokio::test]
async fn stdin_arrives_and_its_end_closes_it() {
    let mut agent = agent!(ready);
    let mut spec = container(&["cat"]);
    spec.stdin = true;
    agent.create("c", spec).await.unwrap();
    // Before the start: it waits.
    let (mut stdin, reply) = agent.open("c", "", Kind::Stdin, 0).await;
    assert_eq!(reply.outcome, Outcome::Accepted);
    send_frame(&mut stdin, b"early ").await;
    agent.start_container("c").await.unwrap();
    send_frame(&mut stdin, b"and ").await;
    let (mut output, _) = agent.open("c", "", Kind::Stdout, 0).await;
    read_until(&mut output, "early and ").await;
    drop(stdin);
    // A connection that just ends leaves stdin open.
    let (mut stdin, _) = agent.open("c", "", Kind::Stdin, 0).await;
    send_frame(&mut stdin, b"late").await;
    send_frame(&mut stdin, b"").await;
    assert_eq!(
        text(&agent.read_all("c", "", Kind::Stdout).await),
        "early and late"
    );
    assert_eq!(agent.wait("c").await.exit_code, 0);
}

#[tokio::test]
async fn several_connections_may_write_to_one_stdin() {
    let mut agent = agent!(ready);
    let mut spec = container(&["cat"]);
    spec.stdin = true;
    agent.create("c", spec).await.unwrap();
    agent.start_container("c").await.unwrap();
    let (mut one, _) = agent.open("c", "", Kind::Stdin, 0).await;
    let (mut other, _) = agent.open("c", "", Kind::Stdin, 0).await;
    let (mut output, _) = agent.open("c", "", Kind::Stdout, 0).await;
    send_frame(&mut one, b"one ").await;
    read_until(&mut output, "one ").await;
    send_frame(&mut other, b"other ").await;
    read_until(&mut output, "other ").await;
    send_frame(&mut one, b"again").await;
    read_until(&mut output, "again").await;
    send_frame(&mut other, b"").await;
    assert_eq!(agent.wait("c").await.exit_code, 0);
}

#[tokio::test]
async fn a_forwarded_connection_ends_one_direction_at_a_time() {
    let mut agent = agent!(ready);
    agent
        .create(
            "c",
            shell("nc -l -p 8080 -e sh -c 'cat; echo seen the end' & wait"),
        )
        .await
        .unwrap();
    agent.start_container("c").await.unwrap();
    let (mut stream, reply) = loop {
        let (stream, reply) = agent.open("", "", Kind::Forward, 8080).await;
        // It listens a moment after it started.
        if reply.outcome != Outcome::Refused {
            break (stream, reply);
        }
        assert_eq!(reply.offset, u64::from(libc::ECONNREFUSED.unsigned_abs()));
        tokio::task::yield_now().await;
    };
    assert_eq!(reply.outcome, Outcome::Accepted);
    send_frame(&mut stream, b"hello ").await;
    read_until(&mut stream, "hello ").await;
    send_frame(&mut stream, b"").await;
    read_until(&mut stream, "seen the end\n").await;
    assert_eq!(frame(&mut stream).await, None);
}

#[tokio::test]
async fn a_port_that_is_none_is_refused() {
    let agent = agent!(ready);
    for port in [0, 65536, u64::MAX] {
        let (_, reply) = agent.open("", "", Kind::Forward, port).await;
        assert_eq!(reply.outcome, Outcome::Malformed, "{port}");
    }
}

#[tokio::test]
async fn stdin_once_is_closed_by_the_first_connection_that_ends() {
    let mut agent = agent!(ready);
    let mut spec = container(&["cat"]);
    spec.stdin = true;
    spec.stdin_once = true;
    agent.create("c", spec).await.unwrap();
    agent.start_container("c").await.unwrap();
    let (mut stdin, _) = agent.open("c", "", Kind::Stdin, 0).await;
    send_frame(&mut stdin, b"all").await;
    stdin.shutdown().await.unwrap();
    assert_eq!(text(&agent.read_all("c", "", Kind::Stdout).await), "all");
    assert_eq!(agent.wait("c").await.exit_code, 0);
}

#[tokio::test]
async fn a_terminal_has_a_size_one_stream_and_takes_input() {
    let mut agent = agent!(ready);
    let mut spec = shell("tty; read line; echo got $line; stty size; read line; stty size");
    spec.stdin = true;
    spec.process.as_mut().unwrap().terminal = true;
    agent.create("c", spec).await.unwrap();
    agent.start_container("c").await.unwrap();
    let (mut output, _) = agent.open("c", "", Kind::Stdout, 0).await;
    assert!(read_until(&mut output, "/dev/pts/0").await.contains("/dev/pts/0"));
    assert_eq!(
        agent.open("c", "", Kind::Stderr, 0).await.1.outcome,
        Outcome::NotFound
    );
    let (mut stdin, _) = agent.open("c", "", Kind::Stdin, 0).await;
    send_frame(&mut stdin, b"hello\n").await;
    read_until(&mut output, "got hello").await;
    let resize = v1::ResizeTerminalRequest {
        container_id: "c".into(),
        exec_id: String::new(),
        columns: 132,
        rows: 43,
    };
    agent.client.resize_terminal(resize).await.unwrap();
    send_frame(&mut stdin, b"\n").await;
    read_until(&mut output, "43 132").await;
    assert_eq!(agent.wait("c").await.exit_code, 0);
}

#[tokio::test]
async fn an_exec_session_can_have_a_terminal() {
    let mut agent = agent!(ready);
    agent.create("c", container(&["sleep", "1000"])).await.unwrap();
    agent.start_container("c").await.unwrap();
    let mut wanted = process(&["sh", "-c", "tty; echo $TERM"]);
    wanted.terminal = true;
    let (exit, stdout) = agent.exec("c", "e", wanted).await.unwrap();
    assert_eq!((exit.exit_code, stdout.as_str()), (0, "/dev/pts/0\r\nxterm\r\n"));
}

#[tokio::test]
async fn output_that_nobody_takes_blocks_the_writer_and_arrives_whole() {
    let mut agent = agent!(ready);
    let bytes = 3_000_000;
    agent
        .create("c", shell(&format!("yes 0123456789 | head -c {bytes}")))
        .await
        .unwrap();
    agent.start_container("c").await.unwrap();
    let (mut first, _) = agent.open("c", "", Kind::Stdout, 0).await;
    let mut all = frame(&mut first).await.unwrap();
    // Acknowledge a part, break off, and come back where the acknowledgement was.
    first.write_all(&5u64.to_le_bytes()).await.unwrap();
    all.truncate(11);
    let (mut second, reply) = agent.open("c", "", Kind::Stdout, 11).await;
    assert_eq!((reply.outcome, reply.offset), (Outcome::Accepted, 11));
    let (_, refused) = agent.open("c", "", Kind::Stdout, 10).await;
    assert_eq!(
        (refused.outcome, refused.offset),
        (Outcome::OffsetUnavailable, 11)
    );
    while let Some(bytes) = frame(&mut second).await {
        all.extend(bytes);
        second.write_all(&(all.len() as u64).to_le_bytes()).await.unwrap();
    }
    assert_eq!(all.len(), bytes);
    assert!(all.chunks(11).all(|line| b"0123456789\n".starts_with(line)));
    assert_eq!(agent.wait("c").await.stdout_bytes, bytes as u64);
}

#[tokio::test]
async fn a_shared_pid_namespace_has_the_reaper_as_its_first_process() {
    let mut agent = agent!(ready);
    let mut first = container(&["sleep", "1000"]);
    first.pid_namespace = v1::PidNamespace::PidPod.into();
    agent.create("a", first).await.unwrap();
    agent.start_container("a").await.unwrap();
    let mut second = shell("cat /proc/1/cmdline; ls /proc/1/root 2>&1; ps");
    second.pid_namespace = v1::PidNamespace::PidPod.into();
    let (_, stdout, _) = agent.run("b", second).await;
    assert!(
        stdout.contains("pod-reaper") && stdout.contains("sleep 1000"),
        "{stdout}"
    );
    assert!(!stdout.contains("agent --unix"), "{stdout}");
    let mut third = shell("ps");
    third.pid_namespace = v1::PidNamespace::PidTarget.into();
    third.target_container_id = "a".into();
    let (_, stdout, _) = agent.run("t", third).await;
    assert!(stdout.contains("sleep 1000"), "{stdout}");
}

#[tokio::test]
async fn what_a_container_leaves_in_a_shared_pid_namespace_ends_with_it() {
    let mut agent = agent!(ready);
    let mut spec = shell("sleep 1000 & echo done");
    spec.pid_namespace = v1::PidNamespace::PidPod.into();
    let (exit, stdout, _) = agent.run("c", spec).await;
    assert_eq!((stdout.as_str(), exit.output_cut), ("done\n", false));
}

#[tokio::test]
async fn the_disks_of_the_pod_cannot_be_opened_by_a_node_of_ones_own() {
    let mut agent = agent!(ready);
    let device = std::fs::read_dir("/sys/block")
        .unwrap()
        .flatten()
        .find_map(|entry| {
            let device = std::fs::read_to_string(entry.path().join("dev")).ok()?;
            Some(device.trim().replace(':', " "))
        });
    let Some(device) = device else {
        eprintln!("skipped: no block device on this machine");
        return;
    };
    let script = format!(
        "mknod /d b {device} && mknod /n c 1 3 && echo made; echo x > /n && echo null; dd if=/d of=/dev/null bs=512 count=1 || echo refused"
    );
    let (_, stdout, stderr) = agent.run("c", shell(&script)).await;
    assert_eq!(stdout, "made\nnull\nrefused\n", "{stderr}");
}

#[tokio::test]
async fn a_host_name_of_its_own_does_not_change_the_pods() {
    let mut agent = agent!(ready);
    let mut spec = shell("hostname");
    spec.hostname = "other".into();
    assert_eq!(agent.run("c", spec).await.1, "other\n");
    assert_eq!(agent.run("d", shell("hostname")).await.1, "the-pod\n");
}

#[tokio::test]
async fn shared_memory_is_the_pods() {
    let mut agent = agent!(ready);
    agent.run("a", shell("echo shared > /dev/shm/x")).await;
    assert_eq!(agent.run("b", shell("cat /dev/shm/x")).await.1, "shared\n");
}

#[tokio::test]
async fn limits_of_resources_are_set() {
    let mut agent = agent!(ready);
    let mut spec = shell("ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj");
    let own = spec.process.as_mut().unwrap();
    own.rlimits = vec![v1::Rlimit {
        r#type: "RLIMIT_NOFILE".into(),
        soft: 100,
        hard: 200,
    }];
    own.oom_score_adj = 500;
    assert_eq!(agent.run("c", spec).await.1, "100\n200\n500\n");
}

#[tokio::test]
async fn a_container_whose_output_nobody_takes_can_be_removed() {
    let mut agent = agent!(ready);
    agent.create("c", container(&["yes"])).await.unwrap();
    agent.start_container("c").await.unwrap();
    let (mut output, _) = agent.open("c", "", Kind::Stdout, 0).await;
    frame(&mut output).await.unwrap();
    agent.remove("c").await;
}
