# Caisson's entry points. Each installs what it needs (as root, on Debian 12) and can be called on a fresh machine.
#
#   make demo     a real pod in a real VM, from nothing; six to seven minutes the first time
#   make test     every test, end to end ones included
#   make e2e-node the end-to-end tests inside a node VM, where KVM works; NODE_TESTS='pods isolation' for some of them
#   make e2e-node-short  those of them that CI runs
#   make critest-node  critest's conformance specs in that VM; CRITEST_NODE='--focus REGEXP' for others
#   make bench-vmm the built-in VMM beside QEMU, in that VM
#   make node-shell  a shell in that VM
#   make e2e-kubelet  the end-to-end tests with a real kubelet and static pods
#   make check    formatting and lints
#   make critest  cri-tools' conformance tests, judged by docs/conformance.md; CRITEST='--focus REGEXP' for some of them
#   make fs-conformance  pjdfstest and fsx on the file systems that a container sees, judged by docs/storage.md
#   make bench-storage  fio and small files on them, next to the host's own and QEMU with virtiofsd
#   make bench    figures for docs/performance.md
#   make bench-streaming  figures of exec sessions, next to containerd's
#   make bench-images  figures of pulling and converting, next to containerd's
#   make fuzz     the VMM's devices and protocol under libFuzzer, ten minutes each target
#   make run      caissond in the foreground, state below /tmp/caisson, its own bridge network for pods
#   make registry a registry in the foreground on 127.0.0.1:5000 that holds demo/busybox:1
#   make help     this list

SHELL := /bin/bash
CAISSON_CACHE ?= $(HOME)/.cache/caisson
export CAISSON_CACHE
TARGET := x86_64-unknown-linux-gnu
AGENT := target/$(TARGET)/guest/caisson-agent
GUEST := guest/out
RUN ?= /tmp/caisson
CARGO ?= cargo

.PHONY: help setup build build-demo agent guest guest-tuned demo test unit e2e e2e-tuned check bench bench-images bench-streaming bench-vmm fuzz run registry
.PHONY: crictl nri-plugin critest kubelet e2e-kubelet fs-conformance bench-storage node-shell e2e-node e2e-node-short critest-node
help:
	@sed -n 's/^#   //p' Makefile

setup:
	@./tests/setup.sh

# The test programs come with it: built apart, cargo would compile half of their libraries again with other features.
PACKAGES := -p caissond -p caisson-vmm -p caisson-vhost-vsock -p caisson-file-server -p caisson-image -p caisson-e2e
build: setup
	$(CARGO) build --release $(PACKAGES) --bins

# What the demo needs of it: on a fresh machine everybody waits for this.
build-demo: setup
	$(CARGO) build --release $(PACKAGES) --bin caissond --bin caisson-vmm --bin caisson-vhost-vsock --bin caisson-file-server --bin caisson-layer-converter --bin demo

# Static, so that it is the only file a guest needs; --target keeps build scripts and macros dynamic.
agent: setup
	CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=static' \
		$(CARGO) build --profile guest --target $(TARGET) -p caisson-agent

guest: agent
	./guest/distribution.sh $(GUEST)/distribution
	./guest/initramfs.sh $(GUEST)/distribution/initramfs.cpio $(AGENT) $(GUEST)/distribution/modules

guest-tuned: agent
	./guest/kernel/build.sh $(GUEST)/tuned
	./guest/initramfs.sh $(GUEST)/tuned/initramfs.cpio $(AGENT)

# Both at once: the agent's link is one long step that leaves a processor to the rest.
demo: setup
	@$(MAKE) --no-print-directory -j2 build-demo guest
	@echo
	@./target/release/demo

# fsck.erofs judges our images. The agent's component tests run it outside a VM, through a door that the product's build does not
# have; one of them boots the product's own in a VM.
unit: build guest
	./cri-server/image/erofs/tests/fetch-erofs-utils.sh >/dev/null
	$(CARGO) test --workspace --exclude caisson-e2e
	CAISSON_TEST_KERNEL=$(CURDIR)/$(GUEST)/distribution/vmlinuz CAISSON_TEST_INITRAMFS=$(CURDIR)/$(GUEST)/distribution/initramfs.cpio \
	CAISSON_TEST_VSOCK=$(CURDIR)/target/release/caisson-vhost-vsock CAISSON_TEST_MKFS_EROFS=$(CAISSON_CACHE)/erofs-utils-1.8/mkfs.erofs \
		$(CARGO) test -p caisson-agent --features component-test

e2e: build guest crictl nri-plugin
	$(CARGO) test --release -p caisson-e2e -- --test-threads=1

e2e-tuned: build guest-tuned crictl
	CAISSON_KERNEL=$(CURDIR)/$(GUEST)/tuned/vmlinux CAISSON_INITRAMFS=$(CURDIR)/$(GUEST)/tuned/initramfs.cpio \
		$(CARGO) test --release -p caisson-e2e --test pods --test containers --test logs --test isolation --test workloads -- --test-threads=1

# A VM that is a real node: what tests see of KVM, cgroup v2 and systemd comes from it.
e2e-node: build guest-tuned crictl nri-plugin
	@./tests/e2e/node/suite.sh $(NODE_TESTS)

# What fits into CI: each thing that KVM, cgroup v2 or the built-in VMM makes different, once.
NODE_SHORT := check cgroups confinement pods=a_pod_lives growth

e2e-node-short: build guest-tuned crictl
	@./tests/e2e/node/suite.sh $(NODE_SHORT)

CRITEST_NODE ?= --focus Conformance

critest-node: build guest-tuned
	@./tests/peers.sh $(CAISSON_CACHE)/bin critest
	@./tests/e2e/node/critest.sh $(CRITEST_NODE)

bench-vmm: build guest-tuned
	@./tests/e2e/node/bench.sh

# A real node as a VM, KVM included; stays up until `tests/e2e/node/run.sh --stop`.
node-shell: setup
	@./tests/e2e/node/run.sh

test:
	@./tests/all.sh

check: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

# What a guest can send, for ten minutes each; tests/all.sh has a short run.
fuzz: setup
	./fuzz/run.sh 600

bench: build guest guest-tuned
	./target/release/bench

fs-conformance: build guest-tuned
	@./tests/peers.sh $(CAISSON_CACHE)/bin pjdfstest fsx
	CAISSON_KERNEL=$(CURDIR)/$(GUEST)/tuned/vmlinux CAISSON_INITRAMFS=$(CURDIR)/$(GUEST)/tuned/initramfs.cpio \
		./target/release/fs-conformance

bench-storage: build guest-tuned
	CAISSON_KERNEL=$(CURDIR)/$(GUEST)/tuned/vmlinux CAISSON_INITRAMFS=$(CURDIR)/$(GUEST)/tuned/initramfs.cpio \
		./target/release/bench-storage

bench-streaming: build guest-tuned
	CAISSON_KERNEL=$(CURDIR)/$(GUEST)/tuned/vmlinux CAISSON_INITRAMFS=$(CURDIR)/$(GUEST)/tuned/initramfs.cpio \
		./target/release/bench_streaming $(BENCH_MIB)

# Pulling and converting, against containerd where CAISSON_BENCH_CONTAINERD names one.
bench-images: build guest
	./target/release/bench_images

run: build guest
	./tests/run-by-hand.sh $(RUN)

registry: build
	./target/release/registry

crictl: setup
	@./tests/peers.sh $(CAISSON_CACHE)/bin crictl

kubelet: setup
	@./tests/peers.sh $(CAISSON_CACHE)/bin kubelet

# With the tuned kernel: a dozen pods, one after the other.
e2e-kubelet: build guest-tuned crictl kubelet
	CAISSON_KERNEL=$(CURDIR)/$(GUEST)/tuned/vmlinux CAISSON_INITRAMFS=$(CURDIR)/$(GUEST)/tuned/initramfs.cpio \
		$(CARGO) test --release -p caisson-e2e --test kubelet -- --ignored --test-threads=1

nri-plugin: setup
	@./tests/peers.sh $(CAISSON_CACHE)/bin nri-plugin

critest: build guest-tuned
	@./tests/peers.sh $(CAISSON_CACHE)/bin critest
	CAISSON_KERNEL=$(CURDIR)/$(GUEST)/tuned/vmlinux CAISSON_INITRAMFS=$(CURDIR)/$(GUEST)/tuned/initramfs.cpio \
		./target/release/critest --report target/critest $(CRITEST)
