"""Starts one program so that it dies with its parent. Run as a script, never imported.

``launch.py PARENT_PID USER SIGNAL COMMAND...`` becomes USER ("-" for no change), asks the
kernel for SIGNAL when the parent's thread ends, makes sure that the parent still lives, and
becomes COMMAND. The order matters: a change of user clears the kernel's promise.
"""

import ctypes
import os
import pwd
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """See the module."""
    parent, user, death_signal, *command = sys.argv[1:]
    if user != "-":
        entry = pwd.getpwnam(user)
        os.setgroups([])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
        os.environ.update(HOME=entry.pw_dir, USER=user)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(death_signal))
    if os.getppid() != int(parent):
        sys.exit(1)  # the parent died before the promise was made
    os.execvp(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()
