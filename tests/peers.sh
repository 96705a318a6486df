#!/bin/bash
# Builds the peers that the tests talk to, from the Go module proxy, once for each version.
#
#   peers.sh BIN-DIRECTORY PEER...
#
# PEER: crictl, critest. Leaves BIN-DIRECTORY/PEER, a link to PEER-VERSION.
set -euo pipefail

cri_tools=v1.36.0
bin=$1
shift
mkdir -p "$bin"

# A module of our own that requires theirs: `go install pkg@version` asks for a list of versions that a proxy need not have.
build() { # peer, module, version, go words...
    local peer=$1 module=$2 version=$3 work
    shift 3
    command -v go >/dev/null || { echo "peers: go is missing: install Go 1.26" >&2; exit 1; }
    echo "building $peer $version (about 2 minutes)"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    (
        cd "$work"
        go mod init caisson.test/peers 2>/dev/null
        go mod edit -require="$module@$version"
        "$@" -mod=mod -trimpath -ldflags "-s -w -X $module/pkg/version.Version=$version" -o "$work/$peer" "$module/cmd/$peer" 2>"$work/log" || {
            cat "$work/log" >&2
            exit 1
        }
    )
    mv "$work/$peer" "$bin/$peer-$version"
}

for peer in "$@"; do
    case $peer in
    crictl) version=$cri_tools module=sigs.k8s.io/cri-tools words=(go build) ;;
    # A test program: ginkgo's specs are only compiled in by `go test`.
    critest) version=$cri_tools module=sigs.k8s.io/cri-tools words=(go test -c -vet=off) ;;
    *) echo "peers: no recipe for $peer" >&2; exit 1 ;;
    esac
    [ -x "$bin/$peer-$version" ] || build "$peer" "$module" "$version" "${words[@]}"
    ln -sfn "$peer-$version" "$bin/$peer"
done
