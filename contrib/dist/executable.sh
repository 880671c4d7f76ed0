#!/bin/sh
# nodepass @VERSION@ for Linux (@ARCH@). Behind the last line is an archive. The first start unpacks it into a cache, and
# each start becomes the program in it, so there is one process. docs/install.md has the details.

tree=@TREE@
offset=@OFFSET@ # of the archive in this file, in bytes, counted from 1
user=$(id -u)

# What starts this program again.
case $0 in
    /*) NODEPASS_PROGRAM=$0 ;;
    *) NODEPASS_PROGRAM=$PWD/$0 ;;
esac
export NODEPASS_PROGRAM

# Print the directories that may have the tree, one a line, the best one first.
find_caches() {
    if [ -n "${NODEPASS_CACHE:-}" ]; then
        echo "$NODEPASS_CACHE"
        return
    fi
    if [ -n "${CACHE_DIRECTORY:-}" ]; then echo "${CACHE_DIRECTORY%%:*}"; fi
    if [ "$user" != 0 ] && [ -n "${XDG_CACHE_HOME:-${HOME:-}}" ]; then
        echo "${XDG_CACHE_HOME:-$HOME/.cache}/nodepass"
    fi
    echo /var/cache/nodepass
    if [ -n "${XDG_RUNTIME_DIR:-}" ]; then echo "$XDG_RUNTIME_DIR/nodepass"; fi
    echo "${TMPDIR:-/tmp}/nodepass-$user"
    echo "/dev/shm/nodepass-$user"
}

# Whether these exist, belong to this user or to root, and no other user can write to them.
are_safe() {
    unsafe=$(find -L "$@" -prune \( -perm -0020 -o -perm -0002 -o ! \( -user 0 -o -user "$user" \) \)) && [ -z "$unsafe" ]
}

refuse_unsafe() {
    are_safe "$1" || { echo "another user can write to it"; return 1; }
}

# Unpack into "$cache", and try that it runs there. Another start may do the same at the same time.
unpack() {
    umask 022
    mkdir -p "$cache" || return
    refuse_unsafe "$cache" || return
    new=$(mktemp -d "$cache/.new.XXXXXX") || return
    chmod 755 "$new"
    if tail -c "+$offset" "$0" | tar -xzf - -C "$new" && "$new/bin/nodepass" -ISB -c pass; then
        mv -T "$new" "$cache/$tree" 2>/dev/null || rm -rf "$new"
        refuse_unsafe "$cache/$tree"
    else
        rm -rf "$new"
        return 1
    fi
}

IFS='
'
for cache in $(find_caches); do
    if are_safe "$cache" "$cache/$tree" 2>/dev/null; then
        exec "$cache/$tree/bin/nodepass" -ISB -m nodepass "$@"
    fi
done
reasons=
for cache in $(find_caches); do
    if reason=$(unpack 2>&1); then
        exec "$cache/$tree/bin/nodepass" -ISB -m nodepass "$@"
    fi
    reasons="$reasons; $cache: $(echo "$reason" | tail -n 1)"
done
echo "nodepass: cannot be unpacked: ${reasons#; }; set NODEPASS_CACHE to a directory that is writable and not noexec" >&2
exit 1
