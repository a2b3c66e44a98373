"""A disk that takes no more bytes. Names can still be changed and removed, as on a real one."""

import errno
import os
import stat


def fill_disk(monkeypatch):
    """From here on nothing that is written lasts: whoever makes sure of it hears that there is no room."""
    sync = os.fsync

    def fsync(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
