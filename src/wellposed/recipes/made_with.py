"""What a part of a run is made with, in a small file beside it: so none is taken for one of other settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wellposed.recipes.run_folder import is_main_process, write_json

__all__ = ["claim_folder"]

SETTINGS_FILE = "made_with.json"
REMEDY = "choose another folder, or remove this one to make it anew"


def claim_folder(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Note in a new folder what its content is going to be made with; in one that is in use, check that it is the same.

    Call it before anything is made, so that an interrupted run, too, goes on with the settings that it began with.

    Args:
        folder: of the part; it need not exist.
        settings: everything that the part depends on, as values that JSON holds.

    Raises:
        ValueError: the folder holds a part made with other settings, or files that say nothing of theirs.
    """
    if not is_main_process():
        return  # the main process has the note; what is wrong with it stops them all
    folder = Path(folder)
    path = folder / SETTINGS_FILE
    wanted = json.loads(json.dumps(settings, default=str))
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} has no {SETTINGS_FILE} to say what its files were made with; {REMEDY}")
        write_json(path, wanted)
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {REMEDY}") from error
    if held != wanted:
        names = [name for name in {**held, **wanted} if held.get(name) != wanted.get(name)]
        differing = ", ".join(f"{name} = {held.get(name)!r} (now {wanted.get(name)!r})" for name in names)
        raise ValueError(f"{folder} was made with {differing}; {REMEDY}")
