"""Makes a tree of everything that a move must keep, and prints the manifest of
trees: kind, mode, owner, size, times, links, extended attributes, content."""

import hashlib, json, os, stat, sys


def make(top):
    os.makedirs(f"{top}/sub/deep", exist_ok=True)
    write(f"{top}/plain", b"plain\n", 0o644)
    write(f"{top}/secret", b"secret\n", 0o600)
    write(f"{top}/run", b"#!/bin/sh\necho run\n", 0o4755)
    write(f"{top}/sub/deep/big", os.urandom(3_000_000), 0o640)
    for name, target in [("hard1", "plain"), ("sub/hard2", "plain")]:
        if not os.path.lexists(f"{top}/{name}"):
            os.link(f"{top}/{target}", f"{top}/{name}")
    if not os.path.lexists(f"{top}/symbolic"):
        os.symlink("sub/deep/../nowhere", f"{top}/symbolic")
    with open(f"{top}/sparse", "wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"island")
    try:
        os.setxattr(f"{top}/plain", "user.cocalc", b"kept \x00 whole")
    except OSError:
        pass  # The manifest shows that there is none, on both sides.
    write(os.fsencode(top) + b"/not-utf8-\xff", b"bytes\n", 0o644)
    os.utime(f"{top}/secret", ns=(1_000_000_001, 1_234_567_890_123_456_789))
    os.utime(f"{top}/symbolic", ns=(2_000_000_002, 987_654_321_987_654_321), follow_symlinks=False)
    os.chmod(f"{top}/sub", 0o2750)


def write(path, data, mode):
    with open(path, "wb") as file:
        file.write(data)
    os.chmod(path, mode)


def manifest(tops):
    entries, links = {}, {}
    for top in tops:
        paths = [top]
        if os.path.isdir(top) and not os.path.islink(top):
            for folder, folders, files in os.walk(os.fsencode(top)):
                paths += [os.path.join(folder, name) for name in folders + files]
        for path in paths:
            shown = os.fsencode(path).decode("utf-8", "backslashreplace")
            s = os.lstat(path)
            links.setdefault((s.st_dev, s.st_ino), []).append(shown)
            entry = {
                "kind": stat.S_IFMT(s.st_mode), "mode": oct(stat.S_IMODE(s.st_mode)),
                "owner": [s.st_uid, s.st_gid], "mtime": s.st_mtime_ns,
            }
            if stat.S_ISREG(s.st_mode):
                entry["size"] = s.st_size
                entry["holes"] = s.st_blocks * 512 < s.st_size // 2 if s.st_size > 1 << 20 else None
                with open(path, "rb") as file:
                    entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            if stat.S_ISLNK(s.st_mode):
                entry["target"] = os.readlink(os.fsencode(path)).decode("utf-8", "backslashreplace")
            names = os.listxattr(path, follow_symlinks=False)
            entry["xattrs"] = {n: os.getxattr(path, n, follow_symlinks=False).hex() for n in sorted(names)}
            entries[shown] = entry
    hard = sorted(sorted(paths) for paths in links.values() if len(paths) > 1)
    return {"entries": entries, "hard links": hard}


if sys.argv[1] == "make":
    make(sys.argv[2])
print(json.dumps(manifest(sys.argv[2:]), sort_keys=True))
