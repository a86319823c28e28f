"""Recipes: what they mean, and what is refused before anything starts."""

import dataclasses
import json
import shutil

import pytest
import stubs

from histokit import runs
from histokit.core import files
from histokit.engine import batch, jobs, replicates
from histokit.runs import notebooks, recipe
from histokit.tiles import description


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "params").mkdir()
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def house(root):
    """Stub notebooks of the main line; nothing here is run."""
    stubs.dataset(root)
    per_class = "class_name: str = 'fat'  # class"
    stubs.notebook(root, "00_dataset", ["dataset: str = 'params/datasets/tiles.yaml'  # description", "budget: dict = {}"])
    stubs.notebook(root, "02_lora", [per_class, "joint_tokens: bool = False", "steps: int = 600", "rate: float = 1e-4"])
    stubs.notebook(root, "03_img2img", [per_class, "lora: str = '02_lora'  # step that trained it", "strength: float = 0.5  # share"])
    stubs.notebook(root, "05_select", [per_class, "source: str = '03_img2img'  # step", "judge: str = ''  # step of the judge, or none"])
    stubs.notebook(root, "06_classifier", ["arms: dict = {'real': {}}  # arms", "seeds: int = 1  # repeats"])
    stubs.notebook(root, "07_evaluate", ["arms_of: str = '06_classifier'  # step", "also: list = []  # steps shown beside it"])
    return root


MAIN = """\
shared: {seed: 3}
steps:
  - 00_dataset
  - judge: {run: 06_classifier, arms: {judge: {mode: linear}}}
  - 02_lora: {class_name: all, joint_tokens: true, rate: 1e-4}
  - plain: {run: 03_img2img, strength: 1}
  - keep: {run: 05_select, source: plain, judge: judge}
  - 06_classifier: {arms: {real: {}, augmented: {synthetic: keep}}, seeds: 6}
  - 07_evaluate
classes:
  mucin: {plain: {strength: 0.35}}
"""


def read(root, text, *given):
    return recipe.read(stubs.recipe(root, text), given)


def refusal(root, text, *given):
    with pytest.raises(recipe.RecipeError) as caught:
        read(root, text, *given)
    return str(caught.value)


def freeze(found, **roles):
    """A finished 00_dataset of this recipe, as its kernel would have left it."""
    roles = roles or {"fat": "tail", "mucin": "tail", "stroma": "head"}
    finish(found, "00_dataset", dataset={"classes": list(roles), "roles": roles})


def finish(found, id, class_name="", **results):
    """A finished run of one step, and its folder."""
    run = runs.start(**recipe.parameters(found, found.steps[id], class_name))
    for name, content in results.items():
        files.write_json(run.path(f"{name}.json"), content)
    run.finish({})
    return run.folder


def test_the_values_that_equal_an_earlier_id_are_the_graph(house):
    parents = {s.id: s.parents for s in read(house, MAIN).steps.values()}
    assert parents["plain"] == ("00_dataset", "02_lora")  # 02_lora from the notebook's default
    assert parents["keep"] == ("00_dataset", "judge", "plain")
    assert parents["06_classifier"] == ("00_dataset", "keep")  # nested in arms
    assert parents["07_evaluate"] == ("00_dataset", "06_classifier")
    listed = read(house, MAIN.replace("07_evaluate", "07_evaluate: {also: [plain, keep]}"))
    assert set(listed.steps["07_evaluate"].parents) == {"00_dataset", "06_classifier", "plain", "keep"}


def test_numbers_are_yaml_1_2_and_an_int_serves_as_a_float(house):
    found = recipe.parameters(read(house, MAIN), read(house, MAIN).steps["02_lora"], "all")
    assert found["rate"] == 1e-4
    plain = recipe.parameters(read(house, MAIN), read(house, MAIN).steps["plain"], "fat")
    assert plain["strength"] == 1.0 and type(plain["strength"]) is float


def test_later_wins(house):
    def strength(class_name, *given, text=MAIN):
        found = read(house, text, *given)
        return recipe.parameters(found, found.steps["plain"], class_name)["strength"]

    shared = MAIN.replace("{seed: 3}", "{seed: 3, strength: 0.9}")
    assert strength("fat", text=shared.replace(", strength: 1}", "}")) == 0.9  # shared beats the notebook's 0.5
    assert strength("fat", text=shared) == 1.0  # the step beats shared
    assert strength("mucin", text=shared) == 0.35  # the class beats the step
    assert strength("mucin", "strength=0.6") == 0.6  # -p beats all
    assert strength("mucin", "plain.strength=0.7", "strength=0.6") == 0.7  # and the closer -p the other


def test_the_runner_fills_in_experiment_step_recipe_and_class(house):
    found = read(house, MAIN, "experiment=other")
    filled = recipe.parameters(found, found.steps["plain"], "fat")
    assert {k: filled[k] for k in ("experiment", "step", "recipe", "class_name", "seed")} == {
        "experiment": "other", "step": "plain", "recipe": "params/study.yaml", "class_name": "fat", "seed": 3,
    }  # fmt: skip
    assert read(house, MAIN).experiment == "study"


def test_command_line_values_are_yaml_unless_text_is_declared(house):
    found = read(house, MAIN, "00_dataset.budget={fat: {tiles: 15, cases: 3}}", "02_lora.rate=1e-3", "dataset=a: b.yaml", 'judge=""')
    assert found.given["00_dataset", True] == {"budget": {"fat": {"tiles": 15, "cases": 3}}}
    assert found.given["02_lora", True] == {"rate": 1e-3}
    assert found.given["00_dataset", False] == {"dataset": "a: b.yaml"}
    assert found.given["keep", False] == {"judge": ""}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("strength: 1", "strenght: 1"), "yaml:6: plain.strenght: 03_img2img.ipynb declares no parameter 'strenght'; did you mean s"),
        (("strength: 1", "strength: high"), "study.yaml:6: plain.strength: expected float, got str 'high'"),
        (("seeds: 6", "seeds: 1e3"), "06_classifier.seeds: expected int, got float 1000.0"),
        (("joint_tokens: true", "joint_tokens: 1"), "02_lora.joint_tokens: expected bool, got int 1"),
        (("judge: judge", "judge: ~"), 'keep.judge: expected str, got nothing; write "" for none'),
        (("rate: 1e-4", "rate: .nan"), "nan is not a number"),
        (("judge: {mode: linear}", "judge: {1: linear}"), "the key 1 must be text; put it in quotes"),
        (("strength: 1", "lora: 2024-01-01"), "plain.lora: date 2024-01-01 is none of str, int"),
        (("seed: 3", "sead: 3"), "study.yaml:1: shared.sead: no notebook of this recipe declares 'sead'; did you mean seed?"),
        (("seed: 3", "seed: x"), "shared.seed (00_dataset.ipynb): expected int, got str 'x'"),
        (("run: 03_img2img", "run: 03_img2igm"), "step 'plain': no notebook '03_img2igm'; did you mean 03_img2img?"),
        (("source: plain", "source: plane"), "keep.source: no earlier step 'plane'; did you mean plain?"),
        (("synthetic: keep", "synthetic: kept"), "06_classifier.arms.augmented.synthetic: no earlier step 'kept'; did you mean keep?"),
        (("strength: 1", "lora: keep"), "plain.lora: 'keep' does not stand before this step"),
        (("strength: 1", "lora: plain"), "plain.lora: 'plain' does not stand before this step"),
        (("  - 02_lora: {class_name: all, joint_tokens: true, rate: 1e-4}\n", ""), "no earlier step '02_lora' (the default of 03_img2img"),
        (("steps:", "stepz:"), "unknown key 'stepz'; did you mean steps?"),
        (("- plain:", "- 02_lora:"), "step id '02_lora' is used twice"),
        (("- plain:", "- ../plain:"), "becomes a folder"),
        (("mucin: {plain:", "mucin: {plian:"), "study.yaml:11: classes.mucin: no step 'plian'; did you mean plain?"),
        (("mucin: {plain: {strength", "mucin: {plain: {strenth"), "classes.mucin.plain.strenth: 03_img2img.ipynb declares no parameter"),
        (("mucin: {plain: {strength: 0.35", "mucin: {02_lora: {rate: 1"), "is pinned to class_name: all, so it takes no value per class"),
        (("mucin: {plain: {strength: 0.35", "mucin: {judge: {seeds: 1"), "this step runs once, so it takes no value per class"),
        (("mucin:", "3:"), "class names that are numbers in quotes"),
        (("class_name: all", "class_name: fat"), "02_lora.class_name can only be `all`; for some classes write `for: [fat]`"),
        (("strength: 1", "for: rare"), "`for:` is tail, all or a list of class names, got 'rare'"),
        (("seeds: 6", "seeds: 6, for: tail"), "06_classifier.ipynb runs once"),
        (("seeds: 6", "seeds: 6, step: x"), "06_classifier.step: filled in by the runner"),
        (("seeds: 6}", "}\n    seeds: 6"), "['06_classifier', 'seeds'] side by side; check the indentation"),
        (("shared: {seed: 3}", "shared: [seed, 3]"), "`shared:` must be a mapping"),
        (("shared: {seed: 3}", "experiment: a/b"), "experiment 'a/b' becomes a folder"),
        (("shared: {seed: 3}", "shared: {seed: 3, seed: 4}"), "study.yaml:1: not YAML: found duplicate key"),
        (("shared: {seed: 3}", "shared: {seed: 3"), "not YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_its_place_and_the_nearest_name(house, change, expected):
    assert MAIN.count(change[0]) == 1 or change[0] in ("strength: 1", "class_name: all", "- plain:", "steps:")
    assert expected in refusal(house, MAIN.replace(*change, 1))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("plain.strenth=1", "-p plain.strenth=1: plain.strenth: 03_img2img.ipynb declares no parameter 'strenth'; did you mean strength?"),
        ("plane.strength=1", "no step 'plane'; did you mean plain?"),
        ("strenth=1", "no notebook of this recipe declares 'strenth'; did you mean strength?"),
        ("plain.strength", "write -p name=value or -p step.name=value"),
        ("plain.strength={", "not YAML"),
        ("plain.strength=[1]", "expected float, got list [1]"),
        ("plain.lora=nothing", "plain.lora: no earlier step 'nothing'"),
        ("experiment=../x", "becomes a folder"),
        ("step=x", "filled in by the runner"),
    ],
)
def test_a_mistake_on_the_command_line_too(house, given, expected):
    assert expected in refusal(house, MAIN, given)


def test_all_mistakes_are_told_at_once(house):
    told = refusal(house, MAIN.replace("strength: 1", "strenth: 1").replace("seeds: 6", "seeds: six"))
    assert len(told.splitlines()) == 2


def test_a_missing_recipe_names_the_nearest_file(house):
    stubs.recipe(house, MAIN)
    with pytest.raises(recipe.RecipeError, match=r"no such file; did you mean study\.yaml"):
        recipe.read(house / "params" / "studi.yaml")


def test_jobs_follow_from_dataset_json(house):
    found = read(house, MAIN)
    names = [j.name for j in jobs.expand(found)]
    assert names[3:5] == ["plain/<rare classes, known after 00_dataset>", "keep/<rare classes, known after 00_dataset>"]
    freeze(found)
    names = [j.name for j in jobs.expand(found)]
    assert names == [
        "00_dataset", "judge", "02_lora/all", "plain/fat", "plain/mucin", "keep/fat", "keep/mucin", "06_classifier", "07_evaluate",
    ]  # fmt: skip
    by = {j.name: j for j in jobs.expand(found)}
    assert by["plain/mucin"].parameters["strength"] == 0.35 and by["plain/fat"].parameters["strength"] == 1.0
    assert by["plain/fat"].parents == (("00_dataset", ""), ("02_lora", "all"))
    assert by["keep/fat"].parents == (("00_dataset", ""), ("judge", ""), ("plain", "fat"))
    assert by["06_classifier"].parents == (("00_dataset", ""), ("keep", "fat"), ("keep", "mucin"))
    assert by["02_lora/all"].folder.name == "all" and by["plain/fat"].folder.name == files.slug("fat")


def test_for_names_the_classes(house):
    freeze(read(house, MAIN))

    def classes(text, *given):
        return [j.class_name for j in jobs.expand(read(house, text, *given)) if j.step == "plain"]

    assert classes(MAIN.replace("strength: 1", "for: all")) == ["fat", "mucin", "stroma"]
    assert classes(MAIN.replace("strength: 1", "for: [stroma, mucin]")) == ["stroma", "mucin"]
    assert classes(MAIN, "plain.for=[mucin]") == ["mucin"]


def test_a_class_that_the_data_lacks_is_refused_before_and_after_00(house):
    for text, wrong in ((MAIN.replace("mucin:", "mucine:"), "mucine"), (MAIN.replace("strength: 1", "for: [mucin, Fat]"), "Fat")):
        for _ in range(2):
            with pytest.raises(recipe.RecipeError, match=f"class '{wrong}' is not in the data; did you mean"):
                jobs.expand(read(house, text))
            freeze(read(house, text))
        (house / "outputs/study/00_dataset/dataset.json").unlink()


def test_data_without_a_rare_class_says_what_to_do(house):
    found = read(house, MAIN.replace("mucin:", "fat:"))
    freeze(found, fat="head", stroma="head")
    with pytest.raises(recipe.RecipeError, match=r"no class is rare.*tail_below"):
        jobs.expand(found)


def plain(house, text=MAIN, *given):
    return [j.class_name for j in jobs.expand(read(house, text, *given)) if j.step == "plain"]


def test_a_corrected_description_is_believed_before_the_old_dataset_json(house):
    stubs.dataset(house, "{fat: {}, mucin: {}, stroma: {}}")
    freeze(read(house, MAIN), fat="head", mucin="head", stroma="head")
    with pytest.raises(recipe.RecipeError, match="no class is rare"):
        plain(house)
    stubs.dataset(house, "{fat: {}, mucin: {role: tail}, stroma: {}}")
    assert plain(house) == ["mucin"], "a role that is given needs no 00 to be known"
    stubs.dataset(house, "{fat: {}, mucin: {}, stroma: {}}\ntail_below: 80")
    unknown = ["<rare classes, known after 00_dataset>"]
    assert plain(house) == unknown
    stubs.dataset(house, "{fat: {}, mucin: {}, stroma: {}}")
    assert plain(house, MAIN, "00_dataset.budget={mucin: {tiles: 2}}") == unknown


def test_a_class_that_was_added_to_the_description_can_be_named_at_once(house):
    freeze(read(house, MAIN))
    stubs.dataset(house, "{fat: {role: tail}, mucin: {role: tail}, stroma: {role: head}, signet: {}}")
    assert plain(house, MAIN.replace("strength: 1", "for: [signet]").split("classes:")[0]) == ["signet"]
    assert plain(house, MAIN.replace("mucin:", "signet:")) == ["fat", "mucin"], "its role is known after 00"
    assert plain(house, MAIN.replace("strength: 1", "for: all")) == ["fat", "mucin", "stroma", "signet"]
    found = jobs.expand(read(house, MAIN))
    assert "plain" not in {j.step for j in batch.select(None, found, classes=["signet"])}
    with pytest.raises(recipe.RecipeError, match="runs for class 'signet'"):  # 00 is not among these, so it stays unknown
        batch.select(read(house, MAIN), found, only=["plain"], classes=["signet"])


def test_results_can_be_read_where_the_tiles_are_not(house):
    freeze(read(house, MAIN))
    (house / "tiles").rmdir()
    (house / "params/datasets/tiles.yaml").touch()
    (house / "params/datasets/tiles.yaml").write_text("root: elsewhere\n")
    assert plain(house) == ["fat", "mucin"]


# ---------------------------------------------------------------- folders of an earlier layout


def test_class_folders_that_the_recipe_no_longer_has_are_left_over(house):
    before = read(house, MAIN.replace("class_name: all, ", ""))
    freeze(before)
    for class_name in ("fat", "mucin"):
        finish(before, "02_lora", class_name)
        finish(before, "plain", class_name)
    finish(before, "plain", "stroma")  # by hand
    left = lambda text, *given: list(jobs.leftovers(jobs.expand(read(house, text, *given))).values())  # noqa: E731
    assert left(MAIN.replace("class_name: all, ", "")) == ["plain/stroma"]
    assert left(MAIN) == ["02_lora/fat", "02_lora/mucin", "plain/stroma"]
    assert left(MAIN, "plain.for=[mucin]") == ["02_lora/fat", "02_lora/mucin", "plain/fat", "plain/stroma"]
    finish(read(house, MAIN), "02_lora", "all")
    assert left(MAIN.replace("class_name: all, ", "")) == ["02_lora/all", "plain/stroma"]
    stubs.dataset(house, "{fat: {role: tail}, mucin: {role: head}, stroma: {role: head}}")
    assert left(MAIN.replace("  mucin:", "  fat:")) == ["02_lora/fat", "02_lora/mucin"], "what is rare is known after 00"


def test_a_replicate_leaves_the_folders_of_the_experiment_it_reads_alone(replicable):
    found = read(replicable, MAIN)
    freeze(found)
    study = replicates.study(found, generators=2)
    finish(study[0], "plain", "stroma")
    finish(study[1], "plain", "stroma")
    finish(dataclasses.replace(study[0], experiment="study-g1"), "judge")
    (folder,) = jobs.leftovers(jobs.expand(study[1]))
    assert folder.parent == replicable / "outputs/study-g1/plain"
    (folder,) = jobs.leftovers(jobs.expand(study[0]))
    assert folder.parent == replicable / "outputs/study/plain"


def test_unlabelled_data_is_one_class(house):
    text = MAIN.split("classes:")[0]
    freeze(read(house, text), tissue="head")
    assert plain(house, text) == ["tissue"]


def test_a_missing_folder_is_refused_before_anything_starts(house):
    (house / "tiles").rmdir()
    with pytest.raises(recipe.RecipeError, match=r"00_dataset: .*root .*tiles is not a folder"):
        jobs.expand(read(house, MAIN))


# ---------------------------------------------------------------- notebooks


def test_papermill_sees_the_names_we_see(root):
    from papermill import inspect_notebook

    lines = [
        "class_name: str = 'fat'  # class, as spelled",
        "arms: dict = {'real': {}, 'more': {'n': 2}}  # nested",
        "order: list = [1, 2]",
        "colour: str = '#ff0000'  # with a hash",
        "rate: float = -1e-4  # negative",
    ]
    path = stubs.notebook(root, "03_img2img", lines)
    ours = notebooks.declared(path)
    assert set(ours) == set(inspect_notebook(str(path)))
    assert ours["colour"].default == "#ff0000" and ours["rate"].default == -1e-4 and ours["class_name"].comment == "class, as spelled"


def test_papermill_sees_the_names_of_every_notebook_we_ship():
    from papermill import inspect_notebook

    for path in notebooks.available("/nonexistent").values():
        assert set(notebooks.declared(path)) == set(inspect_notebook(str(path))), path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rule: str = 'a=b'  # two", 'a second "="'),
        ("rate: float = 0.1  # lr=0.1", 'a second "="'),
        ("name: str | None = ''  # maybe", "the type must be one of"),
        ("pair: tuple = (1, 2)", "the type must be one of"),
        ("name = 'untyped'", "write `name: type = literal"),
        ("double: int = 2 * 3", "must be a literal of type int"),
        ("share: float = 'x'", "expected float, got str 'x'"),
        ("count: int = True", "expected int, got bool"),
        ("a: int = 1; b: int = 2", 'a second "="'),
        ("broken: int =", "is not Python"),
    ],
)
def test_what_papermill_would_misread_is_refused(root, line, expected):
    path = stubs.notebook(root, "03_img2img", [line])
    with pytest.raises(ValueError) as caught:
        notebooks.declared(path)
    assert expected in str(caught.value) and " at 0x" not in str(caught.value)


def test_a_notebook_without_kernelspec_or_tag_is_refused(root):
    path = stubs.notebook(root, "03_img2img", [])
    book = json.loads(path.read_text())
    path.write_text(json.dumps(book | {"metadata": {}}))
    with pytest.raises(ValueError, match="kernelspec"):
        notebooks.declared(path)
    book["cells"][0]["metadata"] = {}
    path.write_text(json.dumps(book))
    with pytest.raises(ValueError, match="tagged `parameters`"):
        notebooks.declared(path)


def test_the_papermill_command_keeps_small_numbers_numbers(root):
    import shlex

    import yaml  # papermill's reader, YAML 1.1

    values = {"rate": 1e-5, "big": 1e20, "half": 0.5, "name": 'a: b\'s "c" ü', "arms": {"x y": [1e-7, True]}, "none": ""}
    command = notebooks.papermill_command("a b.ipynb", "out.ipynb", values)
    words = shlex.split(command)
    assert words[:4] == ["HISTOKIT_NOTEBOOK=a b.ipynb", "papermill", "a b.ipynb", "out.ipynb"] and yaml.safe_load(words[5]) == values


# ---------------------------------------------------------------- the five systems

STEDM = """\
# STEDM: layout from annotated slides, style from others; a segmenter on real and synthetic pairs.
shared: {dataset: params/datasets/tiles.yaml}
steps:
  - 00_dataset
  - autoencoder: {run: 20_pretrain, part: autoencoder}
  - 30_style_layout: {autoencoder: autoencoder, aggregate: mean}
  - no_style: {run: 30_style_layout, autoencoder: autoencoder, aggregate: none}
  - 31_segmentation: {arms: {real: {}, stedm: {synthetic: 30_style_layout}, plain: {synthetic: no_style}}, seeds: 3}
  - 07_evaluate: {arms_of: 31_segmentation}
"""
PER_CLASS = "class_name: str = 'fat'  # class"
TO_COME = {
    "30_style_layout": ["autoencoder: str = '20_pretrain'  # step", "aggregate: str = 'mean'"],
    "31_segmentation": ["arms: dict = {}", "seeds: int = 1"],
}
SHIPPED = {"majority": "majority_to_minority", "logex": "logex", "histodiffusion": "histodiffusion", "mep": "mep"}
SYSTEMS = {"majority": ("", 12), "logex": ("", 15), "histodiffusion": ("", 16), "mep": ("", 18), "stedm": (STEDM, 6)}


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_five_systems_are_recipes(root, name, capsys, repository):
    """Notebooks that exist are the real ones, those still to come are stubs: so no owner can drop a parameter unnoticed."""
    from histokit import cli

    stubs.dataset(root)
    for path in repository.glob("notebooks/*.ipynb"):
        (root / "notebooks").mkdir(exist_ok=True)
        shutil.copy(path, root / "notebooks")
    for notebook, lines in TO_COME.items():
        stubs.notebook(root, notebook, lines)
    text, count = SYSTEMS[name]
    text = text or (repository / f"params/{SHIPPED[name]}.yaml").read_text()
    path = stubs.recipe(root, text, name)
    dry = ["run", str(path), "--dry-run", "-p", "dataset=params/datasets/tiles.yaml"]
    assert cli.main(dry) == 0
    out = capsys.readouterr().out
    assert ("known after 00_dataset" in out) is (name != "stedm")
    freeze(recipe.read(path, ["dataset=params/datasets/tiles.yaml"]))
    capsys.readouterr()
    assert cli.main(dry) == 0
    out = capsys.readouterr().out
    assert f"{count - 1} of {count} jobs to run" in out and "known after" not in out
    assert out.count(" papermill notebooks/") == count - 1


def test_every_recipe_we_ship_is_sound(repository, monkeypatch):
    monkeypatch.setenv("HISTOKIT_ROOT", str(repository))
    shipped = sorted(path.stem for path in (repository / "params").glob("*.yaml"))
    assert {"check_tiles", "first_look", "demo", "majority_to_minority", "logex", "histodiffusion", "histodiffusion_mini", "mini"} <= set(
        shipped
    )
    found = {name: recipe.read(repository / "params" / f"{name}.yaml") for name in shipped}
    names = [j.step for j in jobs.expand(dataclasses.replace(found["demo"], experiment="never-run"))]
    assert names[0] == "00_dataset" and names[-1] == "07_evaluate"
    assert found["ebhi_seg_polyp"].steps["00_dataset"].values["budget"] == {"Polyp": {"tiles": 15, "cases": 3}}
    with pytest.raises(recipe.RecipeError, match="`histokit init FOLDER` drafts one"):
        jobs.expand(
            recipe.read(repository / "params/majority_to_minority.yaml", ["dataset=params/datasets/none.yaml", "experiment=never-run"])
        )


@pytest.fixture
def replicable(house):
    stubs.notebook(house, "00_dataset", ["dataset: str = 'params/datasets/tiles.yaml'", "budget: dict = {}", "draw: int = 0"])
    stubs.notebook(house, "07_evaluate", ["arms_of: str = '06_classifier'", "draws: int = 1", "generators: int = 1"])
    return house


def test_no_experiment_can_write_its_runs_among_the_drawn_tiles(root, repository):
    """Else a recipe named toy.yaml would find its data changed by every run."""
    drawn = description.describe(repository / "params/datasets/toy.yaml").root
    assert not recipe.EXPERIMENT.fullmatch(drawn.relative_to(root / "outputs").parts[0])


def test_one_draw_and_one_generator_is_the_recipe_itself(replicable):
    found = read(replicable, MAIN)
    assert replicates.study(found) == [found]


def test_replicates_redo_what_their_luck_changes_and_the_verdict_comes_last(replicable):
    text = MAIN.replace("- 00_dataset", "- 00_dataset: {budget: {fat: {tiles: 2}}}")
    study = replicates.study(read(replicable, text), draws=2, generators=2)
    assert [one.experiment for one in study] == ["study", "study-g1", "study-d1", "study-d1-g1", "study"]
    every = ["00_dataset", "judge", "02_lora", "plain", "keep", "06_classifier"]
    again = ["02_lora", "plain", "keep", "06_classifier"]
    assert [list(one.steps) for one in study] == [every, again, every, again, ["07_evaluate"]]
    said = lambda one, id: recipe.parameters(one, one.steps[id])  # noqa: E731
    assert [said(one, "plain")["seed"] for one in study[:4]] == [3, 4, 3, 4]
    assert [said(one, "06_classifier")["seed"] for one in study[:4]] == [3] * 4, "classifier seeds are those of every replicate"
    assert list(said(study[1], "06_classifier")["arms"]) == ["augmented"], "real arms do not depend on a generator"
    assert [said(one, "00_dataset")["draw"] for one in (study[0], study[2])] == [0, 1]
    assert (said(study[4], "07_evaluate")["draws"], said(study[4], "07_evaluate")["generators"]) == (2, 2)
    assert study[3].inherits.experiment == "study-d1" and recipe.parameters(study[3].inherits, study[2].steps["00_dataset"])["draw"] == 1


def test_a_generator_replicate_reads_classes_and_steps_of_the_one_before(replicable):
    study = replicates.study(read(replicable, MAIN), generators=2)
    assert [j.name for j in jobs.expand(study[1])][1] == "plain/<rare classes, known after 00_dataset>"
    freeze(study[0])
    names = [j.name for j in jobs.expand(study[1])]
    assert names == ["02_lora/all", "plain/fat", "plain/mucin", "keep/fat", "keep/mucin", "06_classifier"]
    assert [j.parents for j in jobs.expand(study[1])][1] == (("02_lora", "all"),)


def test_replicates_of_nothing_are_refused(replicable):
    with pytest.raises(recipe.RecipeError, match="--draws needs a `budget`"):
        replicates.study(read(replicable, MAIN), draws=3)
    alone = MAIN.replace("augmented: {synthetic: keep}", "more: {}")
    with pytest.raises(recipe.RecipeError, match="--generator-seeds needs an arm with synthetic tiles"):
        replicates.study(read(replicable, alone), generators=2)
    with pytest.raises(recipe.RecipeError, match="must be at least 1, got 0 and 1"):
        replicates.study(read(replicable, MAIN), draws=0)
    with pytest.raises(recipe.RecipeError, match="'study-g1' ends like a replicate"):
        read(replicable, MAIN, "experiment=study-g1")


def test_tiles_from_elsewhere_are_no_dataset_of_the_steps_that_look_at_them(replicable):
    for name, step in (("06_classifier", "arms"), ("07_evaluate", "")):
        book = json.loads((replicable / "notebooks" / f"{name}.ipynb").read_text())
        if step:
            book["cells"][0]["source"] += "\nexternal: str = ''  # step of another 00_dataset"
        (replicable / "notebooks" / f"{name}.ipynb").write_text(json.dumps(book))
    text = MAIN.replace("  - judge:", "  - house: {run: 00_dataset, budget: {}}\n  - judge:")
    text = text.replace("seeds: 6}", "seeds: 6, external: house}").replace(
        "- 00_dataset\n", "- 00_dataset: {budget: {mucin: {tiles: 2}}}\n"
    )
    found = read(replicable, text)
    assert found.steps["06_classifier"].dataset == "00_dataset" and "house" in found.steps["06_classifier"].parents
    first, second, *_ = replicates.study(found, draws=2)
    draws = [{id: recipe.parameters(r, r.steps[id]).get("draw", 0) for id in ("00_dataset", "house")} for r in (first, second)]
    assert draws == [{"00_dataset": 0, "house": 0}, {"00_dataset": 1, "house": 0}], "tiles from elsewhere have no budget to draw"
