"""What a power cut leaves of a directory: the bytes and names that were fsynced, and nothing else.

The strictest disk that POSIX allows: a file's bytes last when the file was fsynced, its name when its directory was.
"""

import os
import shutil
import stat
from pathlib import Path


class LossyDisk:
    """Watches `os.fsync` below a root; `cut` puts the root back to what had to last."""

    def __init__(self, root, monkeypatch):
        self.root = root
        self._contents = {}
        """Bytes by inode, as of the last fsync."""
        self._names = {}
        """Of a directory's inode: the inode by name, as of its last fsync."""
        self._held = {}
        self._sync = os.fsync
        self._note_all(root)
        monkeypatch.setattr(os, "fsync", self._fsync)

    def cut(self):
        """The power goes, and comes back."""
        fresh = self.root.with_name(f"{self.root.name}.after")
        fresh.mkdir()
        self._build(self._inode(self.root), fresh)
        shutil.rmtree(self.root)
        fresh.rename(self.root)
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()
        self._contents.clear()
        self._names.clear()
        self._note_all(self.root)

    def _build(self, directory, target):
        for name, (inode, is_directory) in self._names.get(directory, {}).items():
            if is_directory:
                (target / name).mkdir()
                self._build(inode, target / name)
            else:
                (target / name).write_bytes(self._contents.get(inode, b""))

    def _fsync(self, descriptor):
        self._sync(descriptor)
        self._note(descriptor)

    def _note_all(self, path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self._note(descriptor)
        finally:
            os.close(descriptor)
        for entry in path.iterdir() if path.is_dir() else ():
            if not entry.is_symlink():
                self._note_all(entry)

    def _note(self, descriptor):
        status = os.fstat(descriptor)
        # Held open: the inode of a file that is removed would be given to another one.
        self._hold(f"/proc/self/fd/{descriptor}", status.st_ino)
        if stat.S_ISDIR(status.st_mode):
            self._names[status.st_ino] = entries = {}
            for entry in os.scandir(f"/proc/self/fd/{descriptor}"):
                if not entry.is_symlink():
                    entries[entry.name] = (entry.inode(), entry.is_dir())
                    self._hold(entry.path, entry.inode())
        else:
            self._contents[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def _hold(self, path, inode):
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY)

    @staticmethod
    def _inode(path):
        return path.stat().st_ino


class PowerCutError(BaseException):
    """Not an Exception: nobody on the way may take it for a fault and go on."""


def cut_at(monkeypatch, modules, name, passage=1):
    """Have the crash point `name` of these modules raise at its `passage`-th time."""
    left = [passage]

    def crash_point(point):
        if point == name:
            left[0] -= 1
            if left[0] == 0:
                raise PowerCutError(point)

    for module in modules:
        monkeypatch.setattr(module, "crash_point", crash_point)
