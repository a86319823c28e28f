"""A working root in a temporary folder, with notebooks made from text: small enough to run for real, or never run at all."""

import json

COMMON = ["experiment: str = 'x'  # folder", "step: str = '{name}'  # id", "recipe: str = ''  # file", "seed: int = 0  # run seed"]


def notebook(root, name, parameters, *cells, common=True):
    """Write notebooks/<name>.ipynb with a parameters cell of the given lines, then the cells."""
    lines = [line.replace("{name}", name) for line in COMMON] * common + list(parameters)
    code = {"cell_type": "code", "execution_count": None, "outputs": [], "metadata": {}}
    made = [{**code, "id": "parameters", "metadata": {"tags": ["parameters"]}, "source": "\n".join(lines)}]
    made += [{**code, "id": f"cell-{i}", "source": source} for i, source in enumerate(cells)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "language_info": {"name": "python"}}
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


def recipe(root, text, name="study"):
    path = root / "params" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def dataset(root, classes="{fat: {role: tail}, mucin: {role: tail}, stroma: {role: head}}"):
    """A description of three classes, and their folders."""
    (root / "tiles").mkdir(parents=True, exist_ok=True)
    folder = root / "params" / "datasets"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiles.yaml").write_text(f"root: tiles\ntile_px: 32\nclasses: {classes}\n")


START = "from histokit import runs\nfrom histokit.core import files\nrun = runs.start(**runs.parameters(globals()))"
ROLES = "{'classes': ['fat', 'mucin', 'stroma'], 'roles': {'fat': 'tail', 'mucin': 'tail', 'stroma': 'head'}}"


def chain(root):
    """Four notebooks that run in a second each: data, one run per class that reads it, a judge, a verdict."""
    dataset(root)
    data = ["dataset: str = 'params/datasets/tiles.yaml'  # description"]
    notebook(root, "00_dataset", data, START, f"files.write_json(run.path('dataset.json'), {ROLES})\nrun.finish({{}})")
    make = [
        "class_name: str = 'fat'  # class",
        "data: str = '00_dataset'  # step",
        "strength: float = 0.5  # share",
        "fail: bool = False  # break",
    ]
    body = [
        "run.parent(data)\nassert not fail, 'asked to fail'",
        "files.write_text(run.path('made.txt'), f'{class_name} {strength}')",
        "run.finish({})",
    ]
    notebook(root, "03_img2img", make, START, *body)
    keep = ["class_name: str = 'fat'  # class", "source: str = '03_img2img'  # step whose tiles are judged"]
    notebook(root, "05_select", keep, START, "text = (run.parent(source) / 'made.txt').read_text()", "run.finish({'kept': text})")
    judge = ["source: str = '05_select'  # step", "sentence: str = 'no evidence'  # verdict"]
    notebook(root, "07_evaluate", judge, START, "run.parents(source)", "run.finish({'sentence': sentence})")
    return recipe(root, "steps:\n  - 00_dataset\n  - 03_img2img\n  - 05_select\n  - 07_evaluate\n")
