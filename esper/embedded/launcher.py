"""Starts a program that dies with its parent.

``launcher.py PARENT_PID USER SIGNAL COMMAND...`` switches to USER ("-" for no change), requests SIGNAL
for the end of the parent's thread (PR_SET_PDEATHSIG), checks that the parent still runs, and executes
COMMAND. The order matters: a change of user clears the request.
"""

import ctypes
import os
import pwd
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run the command line that the module describes."""
    parent, user, death_signal, *command = sys.argv[1:]
    if user != "-":
        entry = pwd.getpwnam(user)
        os.setgroups([])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
        os.environ.update(HOME=entry.pw_dir, USER=user)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(death_signal))
    if os.getppid() != int(parent):
        sys.exit(1)  # the parent ended before the request took effect
    os.execvp(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()
