# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# Build one flavour of QEMU (see tools/series/tree.py) in the cache: $WORK/tree
# is its source, $WORK/build is where it is built. Needs common.sh, $ROOT,
# $SCRIPTS (this folder), $CACHE, and the base's name, $BASE_NAME.

# The python3 on PATH may be another one, without Debian's modules. configure
# is told in the environment.
PYTHON=/usr/bin/python3

# What is tested is what is installed: with what VMs of x86 are run with.
CONFIGURE=(
    --target-list=x86_64-softmmu
    --without-default-features
    --enable-{system,tools,replication,kvm,tcg}
    --enable-{linux-aio,linux-io-uring,colo-proxy}
    --enable-{cap-ng,gnutls,keyring,libusb,numa,pixman,seccomp,slirp}
    --enable-{tpm,usb-redir,vhost-kernel,vhost-net,vhost-user,vnc,zstd}
    --disable-docs
    --disable-download
    --disable-install-blobs
)

# With shared libraries of gcc the reports of the undefined behaviour
# sanitizer go to stderr, wherever they are told to go.
SANITIZE=(
    --enable-asan
    --enable-ubsan
    --extra-ldflags='-static-libasan -static-libubsan'
)

# Where the source of the base is, once that is known.
PRISTINE=''

# What the tests and the demo run, and what is installed besides.
TARGETS=(
    qemu-system-x86_64
    qemu-img
    qemu-io
    qemu-nbd
    storage-daemon/qemu-storage-daemon
    qemu-bridge-helper
    qemu-pr-helper
    tests/unit/test-replication
)

# The same for what QEMU does not have, so that the stock flavour does not.
OUR_TARGETS=(
    tests/unit/test-replication-changes
    tests/unit/test-replication-log
    tests/unit/test-replication-meta
    tests/unit/test-write-behind
    tests/qtest/migration-test
)

# Print the source of a base, or why there is none; exit status 3.
fetch_source() {
    "$SCRIPTS/source.sh" qemu "$CACHE" "$1"
}

# Where the user's QEMU is; refuse one that another base is for.
user_source() {
    local tree version
    tree=$(readlink -f "$QEMU_SRC")
    version=$(cut -d . -f 1,2 "$tree/VERSION")
    [ "$version" = "$BASE_NAME" ] || [ ! -d "$ROOT/bases/$version" ] ||
        die "QEMU_SRC=$QEMU_SRC is QEMU $version: use --base $version"
    say "QEMU of $tree, copied"
    echo "$tree"
}

# Set FLAVOUR, OPTIONS to configure it with, PRISTINE, the source to build
# from, FROM, options that tell it to tools, and WORK, where to build.
choose_source() {
    FLAVOUR=$1
    WORK=$CACHE/$FLAVOUR
    [ "$BASE_NAME" = "$REFERENCE" ] || WORK+=-$BASE_NAME
    [ "$FLAVOUR" = stock ] || TARGETS+=("${OUR_TARGETS[@]}")
    OPTIONS=("${CONFIGURE[@]}")
    [ "$FLAVOUR" != sanitize ] || OPTIONS+=("${SANITIZE[@]}")
    if [ -n "${QEMU_SRC:-}" ]; then
        PRISTINE=${PRISTINE:-$(user_source)}
        WORK+=-$(sha256sum <<<"$PRISTINE" | cut -c1-8)
    elif [ -z "$PRISTINE" ]; then
        PRISTINE=$(fetch_source "$BASE_NAME") ||
            die "no source of QEMU $BASE_NAME: $PRISTINE"
    fi
    # newer ones have it without being asked
    ! grep -q "'avx2'" "$PRISTINE/meson_options.txt" ||
        OPTIONS+=(--enable-avx2)
    FROM=(--base "$BASE_NAME" --pristine "$PRISTINE")
}

tree() {
    "$PYTHON" "$ROOT/tools/series/tree.py" --flavour "$FLAVOUR" \
        --cache "$CACHE" "${FROM[@]}" --tree "$WORK/tree" "$@"
}

# Whatever makes a configured build useless when it changes.
configuration() {
    echo "${OPTIONS[@]}"
    echo "$PRISTINE"
    cc --version
    "$PYTHON" --version
    # what is wrong with it, configure says; a traceback is Ctrl-C's
    "$PYTHON" -m mesonbuild.mesonmain --version 2>/dev/null || echo none
}

# Not in one command: bash 5.2 runs no trap between two substitutions.
is_configured() {
    local now
    now=$(configuration)
    [ "$now" = "$(cat "$WORK/configuration" 2>/dev/null)" ]
}

configure() {
    rm -rf "$WORK/build" "$WORK/configuration"
    mkdir -p "$WORK/build"
    (
        cd "$WORK/build" || exit
        export PYTHON
        logged "$WORK/configure.log" configuring \
            ../tree/configure "${OPTIONS[@]}"
    )
    configuration >"$WORK/configuration"
}

# ninja itself cannot say: QEMU's build always has something to run.
is_built() {
    [ "${TARGETS[*]}" = "$(cat "$WORK/built" 2>/dev/null)" ] &&
        is_configured && tree --is-current 2>/dev/null
}

# A warning in a file of ours or one that we patch is an error. Its file is
# made to look new, so that the next build says it again.
refuse_warnings() {
    local ours warned
    ours=$(tree --list)
    warned=$(sed -n 's#^\(\.\./\)*tree/\(.*\):[0-9]*:[0-9]*: warning: .*#\2#p' \
                 "$WORK/build.log" | sort -u | grep -Fx "$ours") || return 0
    grep -A 6 'warning:' "$WORK/build.log" >&2
    (cd "$WORK/tree" && xargs -d '\n' touch) <<<"$warned"
    die "the compiler warns about: ${warned//$'\n'/, }"
}

# Build with nobody else in $WORK.
build_exclusively() {
    rm -f "$WORK/built"
    tree || die "the tree in $WORK/tree could not be made"
    is_configured || configure
    NINJA_STATUS='[%f/%t] ' logged "$WORK/build.log" compiling \
        ninja -C "$WORK/build" "${TARGETS[@]}"
    # the sanitizers' code confuses gcc: it warns of what cannot be
    [ "$FLAVOUR" = sanitize ] || refuse_warnings
    echo "${TARGETS[*]}" >"$WORK/built"
}

lock() {
    flock -n "$@" || {
        say "waiting for another run in $WORK to end"
        flock "$@"
    }
}

# Have configure find a meson that is new enough.
use_meson() {
    local meson
    meson=$("$SCRIPTS/source.sh" meson "$CACHE")
    [ -n "$meson" ] || return 0
    export PYTHONPATH=$meson${PYTHONPATH:+:$PYTHONPATH}
}

# Build a flavour, and hold it unchanged until this process ends. Two locks:
# who builds holds the first alone; who runs what was built holds the second
# together with others, and gets it only while holding the first.
build() {
    # shellcheck disable=SC2034 # common.sh uses it
    STEP=build
    choose_source "$1"
    use_meson
    mkdir -p "$WORK"
    exec 8>"$WORK/build.lock" 9>"$WORK/use.lock"
    lock 8
    if ! is_built; then
        lock 9
        build_exclusively
    fi
    lock -s 9
    # the packages may have come after it was built
    link_firmware "$WORK/build/qemu-bundle/usr/local/share/qemu"
    exec 8>&-
}
