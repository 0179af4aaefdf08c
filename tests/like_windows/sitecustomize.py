"""A stand-in for Windows: a Python that has this folder on its PYTHONPATH, and every Python it starts, lacks what
Windows lacks.

For our own modules (`sdcompress`, `engines`, `bench` and `plugins` of the checkout):

- `fcntl`, `resource`, `pwd` and other POSIX modules cannot be imported;
- names of `os` and `signal` that Windows does not have are missing, and `multiprocessing` can only spawn;
- `/proc` and `/sys` are not there;
- text files without an encoding are cp1252 and have CRLF line ends;
- a file that is open or mapped in this process can be neither removed nor replaced, and the folder of an open one
  neither;
- no folder is replaced by another one, links need a privilege, and names that NTFS refuses are refused.

The standard library and other packages see `sys.platform == "linux"` and do what is right on Linux. So a module or a
name is refused to a caller of ours, and a file operation where the nearest caller outside the standard library is ours.
"""

from __future__ import annotations

import builtins
import errno
import importlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import sysconfig
import types
from collections.abc import Callable
from typing import Any

ROOT = os.environ.get("LIKE_WINDOWS_ROOT") or os.path.dirname(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
)
OURS = tuple(os.path.join(ROOT, folder) + os.sep for folder in ("sdcompress", "engines", "bench", "plugins"))
STDLIB = sysconfig.get_path("stdlib") + os.sep
HERE = os.path.abspath(__file__)
MODULES = {"fcntl", "grp", "nis", "posix", "pty", "pwd", "readline", "resource", "spwd", "syslog", "termios", "tty"}
OS_NAMES = {
    "chown",
    "chroot",
    "confstr",
    "copy_file_range",
    "ctermid",
    "eventfd",
    "fchdir",
    "fchown",
    "fork",
    "forkpty",
    "getegid",
    "geteuid",
    "getgid",
    "getgroups",
    "getloadavg",
    "getpgid",
    "getpgrp",
    "getpriority",
    "getsid",
    "getuid",
    "killpg",
    "lchown",
    "listxattr",
    "memfd_create",
    "mkfifo",
    "mknod",
    "nice",
    "openpty",
    "O_CLOEXEC",
    "O_DIRECTORY",
    "O_NOFOLLOW",
    "O_NONBLOCK",
    "pipe2",
    "posix_fadvise",
    "posix_fallocate",
    "posix_spawn",
    "pread",
    "pwrite",
    "register_at_fork",
    "sched_getaffinity",
    "sched_setaffinity",
    "sendfile",
    "setpgid",
    "setpriority",
    "setsid",
    "setuid",
    "splice",
    "statvfs",
    "sync",
    "sysconf",
    "sysconf_names",
    "ttyname",
    "uname",
    "wait",
    "wait3",
    "wait4",
    "waitid",
    "WNOHANG",
}
WINDOWS_SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
SIGNAL_NAMES = {name for name in dir(signal) if name.startswith("SIG") and name not in WINDOWS_SIGNALS}
SIGNAL_NAMES |= {"alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "siginterrupt", "sigwait"}
BAD_NAME = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$|^(CON|PRN|AUX|NUL|COM\d|LPT\d)(\.|$)', re.IGNORECASE)
PRESENT = {
    name: getattr(os, name)
    for name in (
        "lstat",
        "listdir",
        "mkdir",
        "open",
        "readlink",
        "remove",
        "rename",
        "replace",
        "rmdir",
        "scandir",
        "stat",
        "unlink",
    )
}


def is_ours(file: str) -> bool:
    return file.startswith(OURS)


def caller_is_ours(depth: int = 2) -> bool:
    """Whether the nearest caller outside the standard library and this file is one of our modules."""
    frame: Any = sys._getframe(depth)
    while frame is not None:
        file = frame.f_code.co_filename
        if not (
            file == HERE or file.startswith("<frozen") or (file.startswith(STDLIB) and "site-packages" not in file)
        ):
            return is_ours(file)
        frame = frame.f_back
    return False


class WithoutPosix(types.ModuleType):
    """A module whose POSIX names a caller of ours does not see."""

    def __getattribute__(self, name: str) -> Any:
        get = types.ModuleType.__getattribute__
        if name in get(self, "_lacking") and is_ours(sys._getframe(1).f_code.co_filename):
            raise AttributeError(f"module {get(self, '__name__')!r} has no attribute {name!r}")
        return get(self, name)


def lack_names() -> None:
    for module, names in ((os, OS_NAMES), (signal, SIGNAL_NAMES)):
        module._lacking = names  # type: ignore[attr-defined]
        module.__class__ = WithoutPosix
    methods, context = multiprocessing.get_all_start_methods, multiprocessing.get_context

    def get_all_start_methods() -> list[str]:
        return ["spawn"] if caller_is_ours() else methods()

    def get_context(method: str | None = None) -> Any:
        if not caller_is_ours():
            return context(method)
        if method not in (None, "spawn"):
            raise ValueError(f"cannot find context for {method!r}")
        return context("spawn")

    multiprocessing.get_all_start_methods = get_all_start_methods
    multiprocessing.get_context = get_context


def lack_modules() -> None:
    import_, import_module = builtins.__import__, importlib.import_module

    def __import__(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if not level and name.partition(".")[0] in MODULES and is_ours(str((globals or {}).get("__file__", ""))):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_(name, globals, locals, fromlist, level)

    def import_named(name: str, package: str | None = None) -> Any:
        if name in MODULES and caller_is_ours():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_module(name, package)

    builtins.__import__ = __import__
    importlib.import_module = import_named


def path_of(file: Any, dir_fd: int | None = None) -> str | None:
    """An absolute path, or None for a descriptor."""
    if isinstance(file, int):
        return None
    name = os.fsdecode(file)
    folder = os.getcwd() if dir_fd is None else PRESENT["readlink"](f"/proc/self/fd/{dir_fd}")
    return os.path.normpath(os.path.join(folder, name))


def refuse_absent(file: Any) -> None:
    """`/proc` and `/sys` are not there. The path is as it was given: none of ours goes there by `..`."""
    name = file if isinstance(file, str) else os.fsdecode(file) if isinstance(file, (bytes, os.PathLike)) else ""
    if name.startswith(("/proc", "/sys")) and name.split("/")[1] in ("proc", "sys") and caller_is_ours():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def windows_error(kind: type[OSError], number: int, winerror: int, text: str, path: str) -> OSError:
    error = kind(number, text, path)
    error.winerror = winerror  # type: ignore[attr-defined]
    return error


def refuse_bad_name(path: str | None) -> None:
    if path is not None and (
        bad := next((part for part in path.split(os.sep) if part and BAD_NAME.search(part)), None)
    ):
        raise windows_error(
            OSError,
            errno.EINVAL,
            123,
            f"The filename, directory name, or volume label syntax is incorrect: {bad!r}",
            path,
        )


def refuse_open(path: str | None) -> None:
    """Refuse a file that is open or mapped in this process, a folder that holds an open file, the current folder."""
    if path is None:
        return
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    held = set()
    for number in PRESENT["listdir"]("/proc/self/fd"):
        try:
            if stat.S_ISREG(PRESENT["stat"](f"/proc/self/fd/{number}").st_mode):
                held.add(PRESENT["readlink"](f"/proc/self/fd/{number}"))
        except OSError:
            continue
    held.add(os.path.join(os.getcwd(), "."))
    with original_open("/proc/self/maps") as file:
        mapped = any(line.rstrip("\n").endswith(f" {path}") for line in file)
    if mapped or any(each == path or each.startswith(path + os.sep) for each in held):
        raise windows_error(
            PermissionError,
            errno.EACCES,
            32,
            "The process cannot access the file because it is being used by another process",
            path,
        )


original_open = builtins.open


def open_like_windows(
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Any = None,
) -> Any:
    refuse_absent(file)
    if caller_is_ours():
        if set(mode) & set("wax+"):
            refuse_bad_name(path_of(file))
        if "b" not in mode:
            encoding = "cp1252" if encoding in (None, "locale") else encoding
            newline = "\r\n" if newline is None and set(mode) & set("wax") else newline
    return original_open(file, mode, buffering, encoding, errors, newline, closefd, opener)


def looked_at(name: str) -> Callable[..., Any]:
    function = PRESENT[name]

    def look(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
        refuse_absent(path)
        return function(path, *args, **kwargs)

    return look


def removed(name: str) -> Callable[..., Any]:
    function = PRESENT[name]

    def remove(path: Any, *, dir_fd: int | None = None) -> Any:
        if caller_is_ours():
            refuse_open(path_of(path, dir_fd))
        return function(path, dir_fd=dir_fd)

    return remove


def moved(name: str) -> Callable[..., Any]:
    function = PRESENT[name]

    def move(src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> Any:
        if caller_is_ours():
            source, target = path_of(src, src_dir_fd), str(path_of(dst, dst_dir_fd))
            refuse_bad_name(target)
            refuse_open(source)
            refuse_open(target)
            if os.path.isdir(target) or (name == "rename" and os.path.lexists(target)):
                raise windows_error(PermissionError, errno.EACCES, 5, "Access is denied", target)
        return function(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    return move


def restrict_files() -> None:
    builtins.open = io.open = open_like_windows
    for name in ("lstat", "listdir", "open", "readlink", "scandir", "stat"):
        setattr(os, name, looked_at(name))
    for name in ("remove", "rmdir", "unlink"):
        setattr(os, name, removed(name))
    for name in ("rename", "replace"):
        setattr(os, name, moved(name))
    mkdir, symlink = os.mkdir, os.symlink

    def make_folder(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if caller_is_ours():
            refuse_bad_name(path_of(path, dir_fd))
        mkdir(path, mode, dir_fd=dir_fd)

    def make_link(src: Any, dst: Any, target_is_directory: bool = False, *, dir_fd: int | None = None) -> None:
        if caller_is_ours():
            raise windows_error(
                OSError, errno.EINVAL, 1314, "A required privilege is not held by the client", os.fsdecode(dst)
            )
        symlink(src, dst, target_is_directory, dir_fd=dir_fd)

    os.mkdir, os.symlink = make_folder, make_link
    shutil._use_fd_functions = False  # type: ignore[attr-defined]


def narrow_output() -> None:
    """What is redirected is in a code page, as Windows has it."""
    for stream, how in ((sys.stdout, "strict"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="cp1252", errors=how)


if sys.platform == "linux":
    lack_names()
    lack_modules()
    restrict_files()
    narrow_output()
