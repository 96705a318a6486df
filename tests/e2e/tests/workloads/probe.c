/* Prints "ok NAME" or "FAIL NAME: reason" for each feature. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/fanotify.h>
#include <linux/if_alg.h>
#include <linux/io_uring.h>
#include <linux/landlock.h>
#include <linux/perf_event.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

static void say(const char *name, long result) {
    if (result >= 0) printf("ok %s\n", name);
    else printf("FAIL %s: %s\n", name, strerror(errno));
}

int main(void) {
    say("add_key", syscall(SYS_add_key, "user", "probe", "x", 1, -1 /* the thread's keyring */));
    say("persistent keyring", syscall(SYS_keyctl, 22 /* KEYCTL_GET_PERSISTENT */, -1, -1));
    say("userfaultfd", syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY));
    struct io_uring_params ring = {0};
    say("io_uring", syscall(SYS_io_uring_setup, 8, &ring));
    int fan = fanotify_init(FAN_CLASS_CONTENT, O_RDONLY);
    say("fanotify", fan);
    say("fanotify permission events", fanotify_mark(fan, FAN_MARK_ADD, FAN_OPEN_PERM, AT_FDCWD, "/tmp"));
    if (fan >= 0) close(fan);
    say("inotify", inotify_init1(0));
    say("mqueue", syscall(SYS_mq_open, "probe", O_CREAT | O_RDWR, 0600, NULL));
    say("shmget", shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600));
    say("msgget", msgget(IPC_PRIVATE, IPC_CREAT | 0600));
    say("semget", semget(IPC_PRIVATE, 1, IPC_CREAT | 0600));
    struct perf_event_attr event = { .type = PERF_TYPE_SOFTWARE, .size = sizeof event, .config = PERF_COUNT_SW_TASK_CLOCK };
    say("perf_event_open", syscall(SYS_perf_event_open, &event, 0, -1, -1, 0));
    say("/dev/fuse", open("/dev/fuse", O_RDWR));
    say("/dev/net/tun", open("/dev/net/tun", O_RDWR));
    union bpf_attr map = { .map_type = BPF_MAP_TYPE_HASH, .key_size = 4, .value_size = 4, .max_entries = 1 };
    say("bpf", syscall(SYS_bpf, BPF_MAP_CREATE, &map, sizeof map));
    say("landlock", syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION));
    say("seccomp", prctl(PR_GET_SECCOMP));
    struct sockaddr_alg hash = { .salg_family = AF_ALG, .salg_type = "hash", .salg_name = "sha256" };
    int alg = socket(AF_ALG, SOCK_SEQPACKET, 0);
    say("AF_ALG", alg < 0 ? alg : bind(alg, (struct sockaddr *)&hash, sizeof hash));
    say("SCTP", socket(AF_INET, SOCK_STREAM, 132));
    say("MPTCP", socket(AF_INET, SOCK_STREAM, 262));
    say("AF_XDP", socket(44, SOCK_RAW, 0));
    say("AF_PACKET", socket(AF_PACKET, SOCK_RAW, 0));
    say("NETLINK_XFRM", socket(AF_NETLINK, SOCK_RAW, 6));
    int tcp = socket(AF_INET, SOCK_STREAM, 0);
    say("BBR", setsockopt(tcp, 6, 13 /* TCP_CONGESTION */, "bbr", 3));
    say("memfd", memfd_create("probe", MFD_ALLOW_SEALING));
    say("pidfd_open", syscall(SYS_pidfd_open, getpid(), 0));
    say("timerfd", timerfd_create(CLOCK_BOOTTIME, 0));
    say("membarrier", syscall(SYS_membarrier, 0, 0, 0));
    say("kcmp", syscall(SYS_kcmp, getpid(), getpid(), 0, 0, 0));
    long page = (long)mmap(NULL, 2 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    say("MAP_HUGETLB", page == -1 ? -1 : 0);
    say("a terabyte without memory", mmap(NULL, 1L << 40, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? -1 : 0);
    puts("ok the end");
    return 0;
}
