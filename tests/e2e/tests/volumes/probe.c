/*
 * What busybox has no applet for: memory maps, extended attributes, Unix sockets and inotify, one verb each. Static, so that it runs in any
 * image. Prints what it found; says what failed and ends with 1.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/xattr.h>
#include <unistd.h>

#define LENGTH 12288

static void check(int fine, const char *what) {
    if (!fine) {
        perror(what);
        exit(1);
    }
}

/* map FILE TEXT: writes through a shared map of a file, at its beginning and in its last page. */
static void map_write(const char *file, const char *text) {
    int fd = open(file, O_RDWR | O_CREAT, 0644);
    check(fd >= 0, "open");
    check(ftruncate(fd, LENGTH) == 0, "ftruncate");
    char *map = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    check(map != MAP_FAILED, "mmap");
    strcpy(map, text);
    strcpy(map + LENGTH - 4096, text);
    check(msync(map, LENGTH, MS_SYNC) == 0, "msync");
}

/* mapped FILE: what a shared map of it shows at both places. */
static void map_read(const char *file) {
    int fd = open(file, O_RDONLY);
    check(fd >= 0, "open");
    char *map = mmap(NULL, LENGTH, PROT_READ, MAP_SHARED, fd, 0);
    check(map != MAP_FAILED, "mmap");
    printf("%s %s\n", map, map + LENGTH - 4096);
}

/* xattr FILE NAME VALUE: sets, reads back, lists. */
static void attribute(const char *file, const char *name, const char *value) {
    char read[256] = {0}, list[1024] = {0};
    check(setxattr(file, name, value, strlen(value), 0) == 0, "setxattr");
    check(setxattr(file, name, value, strlen(value), XATTR_CREATE) == -1, "a second XATTR_CREATE succeeded");
    check(getxattr(file, name, read, sizeof read - 1) == (ssize_t)strlen(value), "getxattr");
    ssize_t length = listxattr(file, list, sizeof list);
    check(length > 0, "listxattr");
    printf("%s", read);
    for (ssize_t at = 0; at < length; at += (ssize_t)strlen(list + at) + 1) printf(" %s", list + at);
    puts("");
}

static struct sockaddr_un address(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    check(strlen(path) < sizeof address.sun_path, "a path this long");
    strcpy(address.sun_path, path);
    return address;
}

/* listen SOCKET: answers the first connection with what it says. */
static void answer(const char *path) {
    struct sockaddr_un name = address(path);
    char text[256];
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    check(bind(listener, (struct sockaddr *)&name, sizeof name) == 0, "bind");
    check(listen(listener, 1) == 0, "listen");
    int peer = accept(listener, NULL, NULL);
    check(peer >= 0, "accept");
    ssize_t length = read(peer, text, sizeof text);
    check(length > 0 && write(peer, text, (size_t)length) == length, "echo");
}

/* connect SOCKET TEXT: says it, and prints the answer. */
static void ask(const char *path, const char *text) {
    struct sockaddr_un name = address(path);
    char heard[256] = {0};
    int peer = socket(AF_UNIX, SOCK_STREAM, 0);
    check(connect(peer, (struct sockaddr *)&name, sizeof name) == 0, "connect");
    check(write(peer, text, strlen(text)) > 0, "write");
    check(read(peer, heard, sizeof heard - 1) > 0, "read");
    puts(heard);
}

/* watch DIRECTORY NAME: ends well as soon as something of that name has been moved into it. */
static void watch(const char *directory, const char *name) {
    char buffer[65536] __attribute__((aligned(8)));
    int events = inotify_init();
    check(inotify_add_watch(events, directory, IN_MOVED_TO) >= 0, "inotify_add_watch");
    puts("watching");
    fflush(stdout);
    for (;;) {
        ssize_t length = read(events, buffer, sizeof buffer);
        check(length > 0, "read");
        for (char *at = buffer; at < buffer + length;) {
            struct inotify_event *event = (struct inotify_event *)at;
            if (event->len > 0 && strcmp(event->name, name) == 0) return;
            at += sizeof *event + event->len;
        }
    }
}

int main(int argc, char **argv) {
    const char *verb = argc > 2 ? argv[1] : "";
    if (!strcmp(verb, "map") && argc == 4) map_write(argv[2], argv[3]);
    else if (!strcmp(verb, "mapped") && argc == 3) map_read(argv[2]);
    else if (!strcmp(verb, "xattr") && argc == 5) attribute(argv[2], argv[3], argv[4]);
    else if (!strcmp(verb, "listen") && argc == 3) answer(argv[2]);
    else if (!strcmp(verb, "connect") && argc == 4) ask(argv[2], argv[3]);
    else if (!strcmp(verb, "watch") && argc == 4) watch(argv[2], argv[3]);
    else {
        fprintf(stderr, "no such verb\n");
        return 2;
    }
    return 0;
}
