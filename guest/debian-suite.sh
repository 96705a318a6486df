#!/bin/bash
# Fetches packages of another Debian suite without changing the host's apt: own sources list, own lists, own cache.
#
#   debian-suite.sh SUITE[,SUITE] DIRECTORY PACKAGE...
#   debian-suite.sh --with-dependencies SUITE[,SUITE] DIRECTORY PACKAGE...
#   debian-suite.sh --archive        prints the archive's address
#
# Leaves the packages' .deb files in DIRECTORY, and with the option everything that they depend on, libc included. PACKAGE may be a shell
# pattern (linux-image-6.12.*-cloud-amd64): the newest match is taken. Of several suites the last one is preferred. The archive's address
# and key are those that this host's own sources use.
set -euo pipefail

# The first Debian archive among the host's sources, in either format; security and vendor archives are not Debian's main one.
archive() {
    {
        sed -n 's/^URIs:[[:space:]]*//p' /etc/apt/sources.list.d/*.sources 2>/dev/null
        sed -nE 's/^deb[[:space:]]+(\[[^]]*\][[:space:]]+)?([^[:space:]]+).*/\2/p' /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null
    } | tr ' ' '\n' | grep -E '/debian/?$' | head -n 1
}
uri=$(archive || true)
[ -n "$uri" ] || { echo "debian-suite: no Debian archive among this host's apt sources (/etc/apt)" >&2; exit 1; }
if [ "$1" = --archive ]; then
    echo "$uri"
    exit
fi

whole=
if [ "$1" = --with-dependencies ]; then
    whole=yes
    shift
fi
suite=$1 destination=$2
shift 2

state="$destination/.apt/$suite"
mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$state/etc"
for one in ${suite//,/ }; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $one main"
done >"$state/etc/sources.list"
touch "$state/status"
apt=(-qq -o Dir::Etc::sourcelist="$(realpath "$state")/etc/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::State="$(realpath "$state")" -o Dir::State::status="$(realpath "$state")/status"
    -o Dir::Cache="$(realpath "$state")/cache" -o APT::Sandbox::User=root -o Acquire::Retries=3)

apt-get "${apt[@]}" update
for wanted in "$@"; do
    package=$wanted
    if [[ $wanted == *[*?]* ]]; then
        package=$(apt-cache "${apt[@]}" pkgnames | while read -r name; do
            # shellcheck disable=SC2053 # a pattern, on purpose
            if [[ $name == $wanted ]]; then echo "$name"; fi
        done | sort -V | tail -n 1)
        [ -n "$package" ] || { echo "debian-suite: no package of $suite matches $wanted" >&2; exit 1; }
    fi
    if [ -n "$whole" ]; then
        apt-get "${apt[@]}" -y --download-only --no-install-recommends -t "${suite##*,}" install "$package"
        mv "$state"/cache/archives/*.deb "$destination/"
    else
        (cd "$destination" && apt-get "${apt[@]}" -t "${suite##*,}" download "$package")
    fi
done
