"""Writing so that a file is either complete or absent."""

import os
import tempfile
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, content: bytes) -> Path:
    """Write ``content`` to ``path``, creating its folder.

    An interruption leaves the previous file as it was: the bytes go to a neighbour first, which then takes the name.

    Returns:
        ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    neighbour = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read; a report is to be read by whoever may list the folder.
        neighbour.chmod(0o644)
        neighbour.replace(path)
    finally:
        neighbour.unlink(missing_ok=True)
    return path
