#!/bin/bash
# Builds the peers that the tests talk to, from the Go module proxy and of Rust crates, once for each version.
#
#   peers.sh BIN-DIRECTORY PEER...
#
# PEER: crictl, critest, kubelet, nri-plugin, pjdfstest, fsx. Leaves BIN-DIRECTORY/PEER, a link to PEER-VERSION.
set -euo pipefail

cri_tools=v1.36.0
kubernetes=v1.36.3
nri=v0.12.1
pjdfstest=0.2.2
fsx=0.3.2
bin=$1
shift
mkdir -p "$bin"
sources=$(cd "$(dirname "$0")" && pwd)/e2e

# A module of our own that requires theirs: `go install pkg@version` asks for a list of versions that a proxy need not have.
build() { # peer, module, version, variable that holds the version, go words...
    local peer=$1 module=$2 version=$3 variable=$4 work
    shift 4
    command -v go >/dev/null || { echo "peers: go is missing: install Go 1.26" >&2; exit 1; }
    echo "building $peer $version (about 2 minutes; kubelet 10)"
    work=$(mktemp -d)
    # Expanded now: it is local.
    trap "rm -rf '$work'" EXIT
    (
        cd "$work"
        go mod init caisson.test/peers 2>/dev/null
        go mod edit -require="$module@$version"
        staged "$module" "$version"
        "$@" -mod=mod -trimpath -ldflags "-s -w -X $variable=$version" -o "$work/$peer" "$module/cmd/$peer" 2>"$work/log" || {
            cat "$work/log" >&2
            exit 1
        }
    )
    mv "$work/$peer" "$bin/$peer-$version"
}

# Kubernetes keeps its libraries in its own tree, at version v0.0.0; they are released apart, as v0.MINOR.PATCH.
staged() { # module, version
    local library
    go mod download "$1@$2"
    for library in $(sed -n 's|^\t*\(k8s.io/[^ ]*\) => ./staging/.*|\1|p' "$(go env GOMODCACHE)/cache/download/$1/@v/$2.mod"); do
        go mod edit -replace="$library=$library@v0.${2#v1.}"
    done
}

# A program of ours on their library.
build_ours() { # peer, module, version, directory, name of what is built
    local peer=$1 module=$2 version=$3 work
    command -v go >/dev/null || { echo "peers: go is missing: install Go 1.26" >&2; exit 1; }
    echo "building $peer on $module $version"
    work=$(mktemp -d)
    # Expanded now: it is local.
    trap "rm -rf '$work'" EXIT
    (
        cp "$4"/*.go "$work"
        cd "$work"
        go mod init "caisson.test/$peer" 2>/dev/null
        go mod edit -require="$module@$version"
        go build -mod=mod -trimpath -ldflags "-s -w" -o "$work/$peer" . 2>"$work/log" || {
            cat "$work/log" >&2
            exit 1
        }
    )
    mv "$work/$peer" "$bin/$peer-$5"
}

# Static, so that it runs in any image.
build_crate() { # peer, version
    local peer=$1 version=$2 work
    echo "building $peer $version (about 2 minutes)"
    work=$(mktemp -d)
    # Expanded now: it is local.
    trap "rm -rf '$work'" EXIT
    RUSTFLAGS='-C target-feature=+crt-static' cargo install --quiet --locked --version "=$version" --target x86_64-unknown-linux-gnu \
        --target-dir "$work/target" --root "$work" "$peer" 2>"$work/log" || {
        cat "$work/log" >&2
        exit 1
    }
    mv "$work/bin/$peer" "$bin/$peer-$version"
}

for peer in "$@"; do
    variable=sigs.k8s.io/cri-tools/pkg/version.Version
    case $peer in
    crictl) version=$cri_tools module=sigs.k8s.io/cri-tools words=(go build) ;;
    # A test program: ginkgo's specs are only compiled in by `go test`.
    critest) version=$cri_tools module=sigs.k8s.io/cri-tools words=(go test -c -vet=off) ;;
    # Go 1.27 builds Kubernetes 1.36, but what it builds does not work.
    kubelet) version=$kubernetes module=k8s.io/kubernetes words=(go build) variable=k8s.io/component-base/version.gitVersion ;;
    nri-plugin)
        version=$nri-$(sha256sum "$sources/nri-plugin/main.go" | cut -c 1-12)
        [ -x "$bin/$peer-$version" ] || build_ours "$peer" github.com/containerd/nri "$nri" "$sources/nri-plugin" "$version"
        ln -sfn "$peer-$version" "$bin/$peer"
        continue
        ;;
    pjdfstest | fsx)
        version=${!peer}
        [ -x "$bin/$peer-$version" ] || build_crate "$peer" "$version"
        ln -sfn "$peer-$version" "$bin/$peer"
        continue
        ;;
    *) echo "peers: no recipe for $peer" >&2; exit 1 ;;
    esac
    [ -x "$bin/$peer-$version" ] || build "$peer" "$module" "$version" "$variable" "${words[@]}"
    ln -sfn "$peer-$version" "$bin/$peer"
done
