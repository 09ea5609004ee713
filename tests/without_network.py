"""A network namespace in which only this machine is there: `python without_network.py COMMAND...`.

The command runs as the same user, with a loopback interface and nothing else; whatever asks the
world is told at once that it is unreachable. Linux only; a kernel may forbid it to users.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

FORBIDDEN = "this kernel forbids network namespaces"  # what a skipped test says, and CI repeats
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1


def enter() -> None:
    """Leave the network behind, for this process and those that it starts.

    Raises OSError where that is forbidden. The process must have one thread.
    """
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH22x", b"lo", _IFF_UP)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)


if __name__ == "__main__":
    try:
        enter()
    except (OSError, AttributeError) as error:  # or no Linux
        sys.exit(f"{FORBIDDEN} ({error})")
    os.execvp(sys.argv[1], sys.argv[1:])
