"""The process that runs one answer: `python -I -S -B inmate.py SECONDS BYTES` in an empty folder.

A program, its tests and a number come on stdin. Needs nothing but Python: it is not part of the package that starts it.
What it says on stdout first is which walls stand; the number follows only when program and tests came to their end.
"""

import ctypes
import os
import resource
import signal
import sys

CREATE, ADD, RESTRICT = 444, 445, 446  # Landlock's system calls, the same on every machine
WRITES = 0x1FF2  # all rights of its first version but to execute, to read files and to list folders
REFER, TRUNCATE = 1 << 13, 1 << 14
NEWUSER, NEWNET = 0x10000000, 0x40000000
FILE = 1 << 20  # bytes of what it prints and of each file it writes
FORBIDDEN = (
    "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.killpg",
    "subprocess.", "pty.", "socket.", "ctypes.", "gc.", "signal.", "resource.", "sys.addaudithook", "sys.setprofile",
    "sys.settrace", "os.chmod", "os.chown", "os.putenv", "os.setxattr", "os.symlink", "os.link",
)  # fmt: skip
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime", "shutil.")


def main() -> None:
    """Limits first, then the program."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    back = os.dup(1)
    os.set_inheritable(back, False)
    folder = os.path.realpath(os.getcwd())
    said = os.open("said", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would go on
    held = walls(folder)
    for what, most in (
        (resource.RLIMIT_CPU, max(1, round(seconds))),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        try:
            resource.setrlimit(what, (most, most))
        except (ValueError, OSError):  # macOS has no limit of the address space
            if what not in (resource.RLIMIT_AS, resource.RLIMIT_NPROC):
                raise
    program, tests = part(0), part(0)
    rest = os.dup(0)  # the number stays unread, and is not where a program looks for input
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.write(back, " ".join(held).encode() + b"\n")
    sys.addaudithook(guard(folder))
    sys.argv[:] = [""]
    names = {"__name__": "__main__"}
    exec(compile(program, "<answer>", "exec"), names)
    exec(compile(tests, "<tests>", "exec"), names)
    os.write(back, part(rest).encode())
    os._exit(0)


def part(channel, read=os.read):
    """What comes next on a descriptor, not a byte more: its length in 16 digits, then itself."""
    found = b""
    for size in (16, None):
        size = int(found) if size is None else size
        found = b""
        while len(found) < size and (piece := read(channel, size - len(found))):
            found += piece
    return found.decode("utf-8", "surrogatepass")


def guard(folder, end=os._exit, real=os.path.realpath, text=os.fspath):
    """Ends the process when it does what an answer has no business to do, even where an error would be caught."""

    def inside(path):
        return isinstance(path, int) or (real(text(path)) + os.sep).startswith(folder + os.sep)

    def hook(event, args):
        if event.startswith(FORBIDDEN):
            end(3)
        if event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if writes and not inside(path):
                end(3)
        elif event.startswith(CHANGES) and not all(inside(p) for p in args[:2] if isinstance(p, (str, bytes))):
            end(3)

    return hook


def walls(folder):
    """Give up files outside the folder, and the network; returns the names of what the kernel grants."""
    if not sys.platform.startswith("linux"):
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    held = []
    if libc.unshare(NEWNET | (NEWUSER if os.geteuid() else 0)) == 0:
        held.append("network")
    abi = libc.syscall(CREATE, None, 0, 1)
    if abi < 1:
        return held
    rights = WRITES | (REFER if abi >= 2 else 0) | (TRUNCATE if abi >= 3 else 0)
    rules = libc.syscall(CREATE, ctypes.byref(ctypes.c_uint64(rights)), 8, 0)
    place = os.open(folder, os.O_PATH)

    class Beneath(ctypes.Structure):
        _pack_ = 1
        _fields_ = [("rights", ctypes.c_uint64), ("place", ctypes.c_int32)]

    granted = rules >= 0 and libc.syscall(ADD, rules, 1, ctypes.byref(Beneath(rights, place)), 0) == 0
    if granted and libc.prctl(38, 1, 0, 0, 0) == 0 and libc.syscall(RESTRICT, rules, 0) == 0:  # no new privileges
        held.append("files")
    os.close(place)
    if rules >= 0:
        os.close(rules)
    return held


if __name__ == "__main__":
    main()
