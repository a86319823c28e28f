"""A study of one's own outside the clone: recipes to change, the notebooks, room for outputs and reviews, and nothing of the package."""

import os
import shutil
from pathlib import Path

from histokit import PACKAGE
from histokit.core import files

HOUSE = PACKAGE.parent  # the clone
README = """# {name}

A histokit study. Run `histokit` inside this folder, or name it in $HISTOKIT_ROOT.

    histokit init FOLDER_OF_TILES       # drafts a description in params/datasets/
    histokit run params/demo.yaml       # the whole story on invented tiles, to see that everything works
    histokit open params/demo.yaml 03_img2img
    make -C {house} lab STUDY="$PWD"    # all notebooks in JupyterLab

`params/` and `params/reviews/` are worth keeping under version control; `outputs/` and `exports/` hold patients' tiles and are not.
{notebooks}
"""


def new(folder, *, copy=False, house=None):
    """Make a study in a new or empty folder; returns the names of what is in it.

    Args:
        folder: where to; an existing one must be empty.
        copy: copy the notebooks, to change them; else they are links to those of the clone and follow it.
        house: the clone, by default the one this package is in.

    Raises:
        FileExistsError: there is something in the folder.
        FileNotFoundError: the package lies without its notebooks (installed from a wheel).
    """
    folder, house = Path(folder).expanduser().resolve(), Path(house or HOUSE)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a folder that does not exist")
    if not (house / "notebooks").is_dir() or not (house / "params").is_dir():
        raise FileNotFoundError(f"no notebooks beside the package in {house}; a study is made from a clone of histokit, installed with -e")
    if folder.is_relative_to(house):
        raise ValueError(f"{folder} lies in the clone; a study lives outside of it")
    for name in ("outputs", "params/reviews"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for path in sorted((house / "params").rglob("*.yaml")):
        target = folder / path.relative_to(house)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (folder / "notebooks").mkdir()
    for path in sorted((house / "notebooks").glob("*.ipynb")):
        target = folder / "notebooks" / path.name
        shutil.copyfile(path, target) if copy else os.symlink(path, target)
    said = "The notebooks are copies, yours to change." if copy else "The notebooks are links into the clone and follow it."
    files.write_text(folder / "README.md", README.format(name=folder.name, notebooks=said, house=house))
    files.write_text(folder / ".gitignore", "outputs/\nexports/\ndata/\n.ipynb_checkpoints/\n")
    return sorted(path.name for path in folder.iterdir())
