//! Sessions over real sockets, with processes and ports that are fakes: what clients see of the protocols, and what ends with them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod client;
mod fake;

use std::{sync::atomic::Ordering, time::Duration};

use caisson_streaming::{
    Config, TlsFiles, Wish,
    port::{Exec, Stdio},
};
use client::{Command, Message, PATIENCE, Said, Spdy, WebSocket, upgrade};
use fake::{Served, pattern, serve};
use tokio::io::AsyncWriteExt;

async fn served() -> Served {
    serve(Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        idle_timeout: Duration::from_secs(600),
    })
    .await
}

const ALL: Stdio = Stdio {
    stdin: true,
    stdout: true,
    stderr: true,
    tty: false,
};

const TERMINAL: Stdio = Stdio {
    stderr: false,
    tty: true,
    ..ALL
};

fn exec(served: &Served, command: &[&str], stdio: Stdio) -> String {
    let wish = Wish::Exec(Exec {
        container: "c".into(),
        command: command.iter().map(ToString::to_string).collect(),
        stdio,
    });
    served.endpoint.url(wish).unwrap()
}

fn forward(served: &Served) -> String {
    served.endpoint.url(Wish::PortForward("pod".into())).unwrap()
}

async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("{what} did not happen"));
}

async fn nothing_is_left(served: &Served) {
    wait_for("the end of everything", || {
        served.world.alive.load(Ordering::SeqCst) == 0
    })
    .await;
}

#[tokio::test]
async fn a_command_has_its_input_its_output_and_its_end() {
    let served = served().await;
    let url = exec(&served, &["cat"], ALL);
    let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"])
        .await
        .unwrap();
    command.send("stdin", b"hello ").await.unwrap();
    command.read_until("hello ").await;
    command.send("stdin", b"world").await.unwrap();
    command.end("stdin").await;
    let outcome = command.finish().await;
    assert_eq!(outcome.stdout, b"world");
    assert!(outcome.stderr.is_empty() && outcome.goodbye);
    assert!(outcome.status.contains("\"Success\""), "{}", outcome.status);
    nothing_is_left(&served).await;
}

#[tokio::test]
async fn two_outputs_arrive_whole_in_order_and_unmixed_with_the_exit_code() {
    let served = served().await;
    let total = 5_000_001;
    let wanted = |seed| (0..total).map(|n| pattern(seed, n)).collect::<Vec<_>>();
    let check = |outcome: client::Outcome| {
        assert!(outcome.stdout == wanted(0x11), "stdout differs");
        assert!(outcome.stderr == wanted(0x77), "stderr differs");
        let status: serde_json::Value = serde_json::from_str(&outcome.status).unwrap();
        assert_eq!(status["details"]["causes"][0]["message"], "3");
    };
    let url = exec(&served, &["mix", &total.to_string()], ALL);
    let command = Command::begin(&url, &["stdin", "stdout", "stderr"])
        .await
        .unwrap();
    check(command.finish().await);
    let url = exec(&served, &["mix", &total.to_string()], ALL);
    check(
        WebSocket::connect(&url, "v5.channel.k8s.io")
            .await
            .unwrap()
            .finish()
            .await,
    );
}

#[tokio::test]
async fn a_frame_of_the_greatest_length_passes_without_being_held_whole() {
    let served = served().await;
    let url = exec(&served, &["cat"], ALL);
    let command = Command::begin(&url, &["stdin", "stdout", "stderr"])
        .await
        .unwrap();
    let (stdin, Command { spdy, ids, .. }) = (command.id("stdin"), command);
    let Spdy {
        reader, mut writer, ..
    } = spdy;
    let sending = tokio::spawn(async move {
        let mut head = stdin.to_be_bytes().to_vec();
        head.extend(0x01ff_ffffu32.to_be_bytes());
        writer.write_all(&head).await.unwrap();
        writer.write_all(&vec![b'x'; 0xff_ffff]).await.unwrap();
        writer
    });
    // Reading and writing at once, as a client must.
    let mut reader = tokio::io::BufReader::new(reader);
    let mut got = 0;
    loop {
        use tokio::io::AsyncReadExt;
        let (first, second) = (reader.read_u32().await.unwrap(), reader.read_u32().await.unwrap());
        let mut payload = vec![0; (second & 0xff_ffff) as usize];
        reader.read_exact(&mut payload).await.unwrap();
        if first == ids["stdout"] {
            got += payload.len();
            if second >> 24 == 1 {
                break;
            }
        }
    }
    assert_eq!(got, 0xff_ffff);
    drop(sending.await.unwrap());
    nothing_is_left(&served).await;
}

#[tokio::test]
async fn sizes_reach_the_terminal_whatever_else_is_sent() {
    let served = served().await;
    let url = exec(&served, &["sizes"], TERMINAL);
    let mut command = Command::begin(&url, &["stdin", "stdout", "resize"])
        .await
        .unwrap();
    command.send("resize", b"{\"Width\":80,\"Hei").await.unwrap();
    command.send("stdin", b"x").await.unwrap();
    command.send("resize", b"ght\":24}\n").await.unwrap();
    command.read_until("80x24\n").await;
    let url = exec(&served, &["sizes"], TERMINAL);
    let mut socket = WebSocket::connect(&url, "v5.channel.k8s.io").await.unwrap();
    socket.send(4, b"{\"Width\":132,\"Height\":43}").await.unwrap();
    loop {
        if let Some(Message::Binary(bytes)) = socket.next().await
            && bytes == b"\x01132x43\n"
        {
            break;
        }
    }
    drop((command, socket));
    nothing_is_left(&served).await;
}

#[tokio::test]
async fn a_client_that_vanishes_takes_the_process_with_it() {
    let served = served().await;
    for command in ["cat", "slow", "flood"] {
        let url = exec(&served, &[command], ALL);
        let begun = Command::begin(&url, &["stdin", "stdout", "stderr"])
            .await
            .unwrap();
        wait_for("the start", || served.world.alive.load(Ordering::SeqCst) == 1).await;
        drop(begun);
        nothing_is_left(&served).await;
        let url = exec(&served, &[command], ALL);
        let socket = WebSocket::connect(&url, "v5.channel.k8s.io").await.unwrap();
        wait_for("the start", || served.world.alive.load(Ordering::SeqCst) == 1).await;
        drop(socket);
        nothing_is_left(&served).await;
    }
}

#[tokio::test]
async fn a_client_that_vanishes_behind_input_that_nobody_reads_is_noticed() {
    let served = served().await;
    let url = exec(&served, &["slow"], ALL);
    let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"])
        .await
        .unwrap();
    // More than a stream's budget, less than that and the sockets' buffers.
    command.send("stdin", &vec![0; 600 << 10]).await.unwrap();
    drop(command);
    nothing_is_left(&served).await;
}

#[tokio::test]
async fn a_process_that_nobody_reads_from_stands_still_and_goes_on() {
    let served = served().await;
    let url = exec(&served, &["flood"], ALL);
    let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"])
        .await
        .unwrap();
    let flooded = || served.world.flooded.load(Ordering::SeqCst);
    // It stops when all buffers are full, which shows in the count not moving.
    let mut last = 0;
    let stopped_at = loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        match flooded() {
            now if now > 0 && now == last => break now,
            now => last = now,
        }
    };
    assert!(stopped_at < 2000, "{stopped_at} pieces without a reader");
    let stdout = command.id("stdout");
    for _ in 0..stopped_at + 50 {
        command.spdy.data_of(stdout).await.unwrap();
    }
    assert!(flooded() > stopped_at);
}

#[tokio::test]
async fn a_client_that_counts_is_given_its_window_back_and_can_ping() {
    let served = served().await;
    let url = exec(&served, &["sip"], ALL);
    let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"])
        .await
        .unwrap();
    command.send("stdin", &vec![0; 60 << 10]).await.unwrap();
    command.spdy.ping(7).await;
    let (mut stream, mut session, mut pong) = (0, 0, false);
    while !pong || stream < 32 << 10 || session < 32 << 10 {
        match command.spdy.next().await.unwrap() {
            Said::Window { stream: 0, delta } => session += delta,
            Said::Window { stream: of, delta } if of == command.id("stdin") => stream += delta,
            Said::Ping(7) => pong = true,
            _ => {}
        }
    }
    assert!(stream <= 60 << 10 && session <= 60 << 10);
}

#[tokio::test]
async fn input_for_a_process_that_reads_none_is_dropped() {
    let served = served().await;
    let url = exec(&served, &["deaf"], ALL);
    let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"])
        .await
        .unwrap();
    for _ in 0..20 {
        // The server may be done and gone meanwhile.
        if command.send("stdin", &[0; 64 << 10]).await.is_err() {
            break;
        }
    }
    let outcome = command.finish().await;
    assert_eq!(outcome.stdout, b"deaf\n");
    assert!(outcome.status.contains("Success"));
    nothing_is_left(&served).await;
}

#[tokio::test]
async fn a_command_that_cannot_run_is_told_in_the_error_stream() {
    let served = served().await;
    let url = exec(&served, &["nonsense"], ALL);
    let command = Command::begin(&url, &["stdin", "stdout", "stderr"])
        .await
        .unwrap();
    let outcome = command.finish().await;
    assert!(outcome.status.contains("no such program") && outcome.status.contains("InternalError"));
    let url = exec(&served, &["nonsense"], ALL);
    let outcome = WebSocket::connect(&url, "v4.channel.k8s.io")
        .await
        .unwrap()
        .finish()
        .await;
    assert!(outcome.status.contains("no such program"));
}

#[tokio::test]
async fn web_socket_v5_half_closes_stdin_and_v4_does_not() {
    let served = served().await;
    let url = exec(&served, &["cat"], ALL);
    let mut socket = WebSocket::connect(&url, "v5.channel.k8s.io").await.unwrap();
    socket.send(0, b"all of it").await.unwrap();
    socket.ping(b"are you there").await.unwrap();
    socket.send(255, &[0]).await.unwrap();
    let outcome = socket.finish().await;
    assert_eq!(outcome.stdout, b"all of it");
    assert!(outcome.goodbye && outcome.status.contains("Success"));

    let url = exec(&served, &["cat"], ALL);
    let mut socket = WebSocket::connect(&url, "v4.channel.k8s.io").await.unwrap();
    socket.send(255, &[0]).await.unwrap();
    socket.send(0, b"still there").await.unwrap();
    loop {
        if let Some(Message::Binary(bytes)) = socket.next().await
            && bytes == b"\x01still there"
        {
            break;
        }
    }

    let url = exec(&served, &["cat"], ALL);
    let mut socket = WebSocket::connect(&url, "v4.base64.channel.k8s.io")
        .await
        .unwrap();
    socket.text("0aGVsbG8=").await.unwrap();
    loop {
        if let Some(Message::Text(text)) = socket.next().await
            && text == b"1aGVsbG8="
        {
            break;
        }
    }
}

#[tokio::test]
async fn a_hundred_sessions_at_once_do_not_mix() {
    let served = served().await;
    let mut clients = tokio::task::JoinSet::new();
    for n in 0..100u32 {
        let url = exec(&served, &["cat"], ALL);
        clients.spawn(async move {
            let text = format!("session {n} ").repeat(2000);
            if n.is_multiple_of(2) {
                let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"])
                    .await
                    .unwrap();
                command.send("stdin", text.as_bytes()).await.unwrap();
                command.end("stdin").await;
                assert_eq!(command.finish().await.stdout, text.as_bytes());
            } else {
                let mut socket = WebSocket::connect(&url, "v5.channel.k8s.io").await.unwrap();
                socket.send(0, text.as_bytes()).await.unwrap();
                socket.send(255, &[0]).await.unwrap();
                assert_eq!(socket.finish().await.stdout, text.as_bytes());
            }
        });
    }
    clients.join_all().await;
    nothing_is_left(&served).await;
}

#[tokio::test]
async fn a_url_is_good_once_and_only_for_what_it_says() {
    let served = served().await;
    let url = exec(&served, &["cat"], ALL);
    drop(
        Command::begin(&url, &["stdin", "stdout", "stderr"])
            .await
            .unwrap(),
    );
    for (url, method, headers, status) in [
        (
            url,
            "POST",
            &[("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")][..],
            404,
        ),
        (exec(&served, &["cat"], ALL), "GET", &[], 400),
        (exec(&served, &["cat"], ALL), "DELETE", &[], 405),
        (
            exec(&served, &["cat"], ALL).replace("/exec/", "/attach/"),
            "POST",
            &[("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")],
            404,
        ),
        (
            exec(&served, &["cat"], ALL),
            "POST",
            &[
                ("Connection", "Upgrade"),
                ("Upgrade", "SPDY/3.1"),
                ("X-Stream-Protocol-Version", "v99"),
            ],
            403,
        ),
    ] {
        let answer = upgrade(&url, method, headers).await.unwrap();
        assert_eq!(answer.status, status, "{method} {headers:?}: {}", answer.head);
    }
}

#[tokio::test]
async fn a_client_that_breaks_the_protocol_is_cut_off_with_its_process() {
    let served = served().await;
    for garbage in [
        &b"\x80\x02\0\x01\0\0\0\x0axxxxxxxxxx"[..],
        b"\x80\x03\0\x01\0\0\0\x0e\0\0\0\x63\0\0\0\0\0\0junk",
        b"\x80\x03\0\x01\0\xff\xff\xff",
    ] {
        let url = exec(&served, &["cat"], ALL);
        let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"])
            .await
            .unwrap();
        wait_for("the start", || served.world.alive.load(Ordering::SeqCst) == 1).await;
        command.spdy.writer.write_all(garbage).await.unwrap();
        while command.spdy.next().await.is_some() {}
        nothing_is_left(&served).await;
    }
    // A stream id that is even or has been used is refused; the session goes on.
    let url = exec(&served, &["cat"], ALL);
    let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"])
        .await
        .unwrap();
    command.spdy.open(&[("streamtype", "stdout")]).await;
    command.spdy.set_next(4);
    command.spdy.open(&[("streamtype", "stdout")]).await;
    command.send("stdin", b"fine").await.unwrap();
    command.read_until("fine").await;
}

#[tokio::test]
async fn forwarded_ports_carry_each_connection_to_its_end() {
    let served = served().await;
    let mut spdy = Spdy::connect(&forward(&served), "portforward.k8s.io")
        .await
        .unwrap();
    let mut pairs = Vec::new();
    for n in 0..20 {
        let (port, request) = ((7000 + n).to_string(), n.to_string());
        let error = spdy
            .open(&[("streamtype", "error"), ("port", &port), ("requestid", &request)])
            .await;
        spdy.data(error, &[], true).await.unwrap();
        let data = spdy
            .open(&[("streamtype", "data"), ("port", &port), ("requestid", &request)])
            .await;
        pairs.push((error, data));
    }
    for (n, (_, data)) in pairs.iter().enumerate() {
        spdy.data(*data, format!("hello {n} ").as_bytes(), true)
            .await
            .unwrap();
    }
    let mut got = std::collections::HashMap::<u32, Vec<u8>>::new();
    let mut ends = 0;
    while ends < 2 * pairs.len() {
        if let Said::Data { stream, bytes, fin } = spdy.next().await.unwrap() {
            got.entry(stream).or_default().extend(bytes);
            ends += usize::from(fin);
        }
    }
    for (n, (error, data)) in pairs.iter().enumerate() {
        assert_eq!(got[data], format!("hello {n} bye").as_bytes());
        assert!(got[error].is_empty());
    }
    nothing_is_left(&served).await;
}

#[tokio::test]
async fn a_port_that_refuses_is_told_in_its_own_error_stream() {
    let served = served().await;
    let mut spdy = Spdy::connect(&forward(&served), "portforward.k8s.io")
        .await
        .unwrap();
    // As clients did before request ids.
    let error = spdy.open(&[("streamtype", "error"), ("port", "9")]).await;
    let data = spdy.open(&[("streamtype", "data"), ("port", "9")]).await;
    let mut text = Vec::new();
    let mut ended = Vec::new();
    while ended.len() < 2 {
        if let Said::Data { stream, bytes, fin } = spdy.next().await.unwrap() {
            if stream == error {
                text.extend(bytes);
            } else {
                assert!(stream == data && bytes.is_empty());
            }
            if fin {
                ended.push(stream);
            }
        }
    }
    assert!(String::from_utf8(text).unwrap().contains("port 9"));
    // What is no pair is reset.
    let wrong = spdy.open(&[("streamtype", "data"), ("port", "nine")]).await;
    loop {
        if let Said::Reset { stream, .. } = spdy.next().await.unwrap() {
            assert_eq!(stream, wrong);
            break;
        }
    }
}

#[tokio::test]
async fn a_forwarded_connection_that_the_client_breaks_off_ends_in_the_pod() {
    let served = served().await;
    let mut spdy = Spdy::connect(&forward(&served), "portforward.k8s.io")
        .await
        .unwrap();
    for request in ["1", "2"] {
        let labels = |kind| [("streamtype", kind), ("port", "80"), ("requestid", request)];
        spdy.open(&labels("error")).await;
        let data = spdy.open(&labels("data")).await;
        spdy.data(data, b"x", false).await.unwrap();
        spdy.data_of(data).await.unwrap();
        if request == "1" {
            spdy.reset(data).await;
            nothing_is_left(&served).await;
        }
    }
    assert_eq!(served.world.alive.load(Ordering::SeqCst), 1);
    drop(spdy);
    nothing_is_left(&served).await;
}

#[tokio::test]
async fn with_a_certificate_only_tls_is_served() {
    use tokio::io::AsyncReadExt;
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let files = TlsFiles {
        certificate: dir.path().join("cert.pem"),
        key: dir.path().join("key.pem"),
    };
    std::fs::write(&files.certificate, made.cert.pem()).unwrap();
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    let config = Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: Some(files.clone()),
        idle_timeout: Duration::from_secs(600),
    };
    let served = serve(config.clone()).await;
    let url = exec(&served, &["cat"], ALL);
    let (address, path) = url.strip_prefix("https://").unwrap().split_once('/').unwrap();

    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = tokio::net::TcpStream::connect(address).await.unwrap();
    let mut tls = tokio_rustls::TlsConnector::from(std::sync::Arc::new(client))
        .connect("127.0.0.1".try_into().unwrap(), tcp)
        .await
        .unwrap();
    let request =
        format!("POST /{path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n");
    tls.write_all(request.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    tls.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 101");

    // Plain HTTP gets nothing.
    let plain = format!("http://{address}/{path}");
    assert!(upgrade(&plain, "POST", &[("Upgrade", "SPDY/3.1")]).await.is_err());
    // Files that are none are told at once.
    std::fs::write(&files.key, "no key").unwrap();
    assert!(caisson_streaming::Server::bind(&config).await.is_err());
}

#[tokio::test]
async fn an_idle_session_is_ended() {
    let served = serve(Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        idle_timeout: Duration::from_millis(200),
    })
    .await;
    let url = exec(&served, &["slow"], ALL);
    let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"])
        .await
        .unwrap();
    while command.spdy.next().await.is_some() {}
    nothing_is_left(&served).await;
}
