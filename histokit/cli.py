"""The `histokit` command. Each command imports what it needs, so that `histokit --help` answers at once."""

import argparse
import os
import shlex
import sys


def main(argv=None):
    """Run one command; returns the exit status: 0 well, 1 something failed, 2 refused before it started."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.call(arguments) or 0
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # our own refusals; anything else is a bug and shows its traceback
        print(f"histokit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


def parser():
    from histokit import __version__

    top = argparse.ArgumentParser("histokit", description="From a folder of tissue tiles to a verdict on synthetic tiles for rare classes.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name, call, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(call=call)
        return sub

    for add in (_add_recipe, _add_study, _add_experiment, _add_selection, _add_history, _add_join):
        add(command)
    return top


def _add_recipe(command):
    """Commands about a recipe."""

    def recipe(sub):
        sub.add_argument("recipe", help="YAML file, for example params/demo.yaml")
        sub.add_argument("-p", "--parameter", action="append", default=[], metavar="[STEP.]NAME=VALUE", help="wins over the recipe")

    def replicated(sub):
        text = "also runs of other {}, for an interval that holds their luck (default 1)"
        sub.add_argument("--draws", type=int, default=1, metavar="N", help=text.format("tiles of the classes made rare"))
        sub.add_argument("--generator-seeds", type=int, default=1, metavar="N", help=text.format("generator seeds"))

    run = command("run", _run, "run what is not done yet of a recipe")
    recipe(run)
    replicated(run)
    run.add_argument("-n", "--dry-run", action="store_true", help="show jobs, estimated time and disk, and each papermill command")
    run.add_argument("--only", nargs="+", default=[], metavar="STEP", help="keep to these step ids")
    run.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="keep to these classes")
    run.add_argument("--force", nargs="+", default=[], metavar="STEP", help="redo these step ids although they are done")
    run.add_argument("-j", "--jobs", type=int, default=1, metavar="N", help="jobs at a time; the cores are shared out (default 1)")
    run.add_argument("-y", "--yes", action="store_true", help="redo more than ten minutes of finished work without asking")

    status = command("status", _status, "what is done, stale (and why) or missing, and the time to redo it")
    recipe(status)
    replicated(status)

    show = command("open", _open, "open one step in JupyterLab with the recipe's values")
    recipe(show)
    show.add_argument("step", help="step id")
    show.add_argument("--class", dest="class_name", default="", metavar="CLASS", help="class, for a step that runs once per class")
    show.add_argument("--no-browser", action="store_true", help="start the server only")
    show.add_argument("--print", action="store_true", help="write the copy, print its path and start nothing")


def _add_study(command):
    """Commands about the machine and what lies on it before the first run."""
    doctor = command("doctor", _doctor, "versions, device, memory, and weights found or missing")
    doctor.add_argument("--base", default="", metavar="PATH", help="also draw a sample with this base model into outputs/doctor.png")

    study = command("new", _new, "a study of your own outside the clone: recipes, notebooks, room for outputs and reviews")
    study.add_argument("folder", help="new or empty folder")
    study.add_argument("--copy", action="store_true", help="copy the notebooks, to change them; else they are links and follow the clone")

    init = command("init", _init, "draft the dataset description of a folder of tiles")
    init.add_argument("folder", help="class folders, train/val/test/CLASS folders, or a folder with a table")
    init.add_argument("-o", "--output", default="", help="file to write; params/datasets/<folder>.yaml by default")


def _add_experiment(command):
    """Commands about finished experiments."""
    page = command("report", _report, "one page about a finished experiment, for a person who was not there")
    page.add_argument("experiment", help="folder below outputs/")
    page.add_argument("--share", action="store_true", help="without real tiles and without names of tiles, cases and folders")
    page.add_argument("-o", "--output", default="", metavar="FILE", help="outputs/<experiment>/report.html by default")

    two = command("compare", _compare, "two experiments: which settings differ, and a paired verdict on the same test tiles")
    two.add_argument("one", help="folder below outputs/")
    two.add_argument("other", help="the one that is held against it")
    two.add_argument("--arms", nargs=2, default=["", ""], metavar="ARM", help="of each; the judged ones by default")


def _add_selection(command):
    """Commands about the tiles of a selection."""
    wall = command("gallery", _gallery, "the tiles of a selection as one offline page for a person's eye")
    wall.add_argument("run", help="folder of a finished 05_select step, for example outputs/demo/05_select")
    wall.add_argument("--blind", action="store_true", help="real training tiles among them, scores and sources hidden: can people tell?")
    wall.add_argument("--seed", type=int, default=0, help="of the order of a blind page, and of which real tiles (default 0)")
    where = "the page to write; gallery.html or gallery-blind.html in that folder by default"
    wall.add_argument("--html", "-o", "--output", nargs="?", default="", const="", metavar="FILE", dest="output", help=where)

    said = command(
        "import-verdicts", _import_verdicts, "what people exported from one gallery page: how far they agree, and into the reviews"
    )
    said.add_argument("files", nargs="+", metavar="JSON", help="one exported file for each person")
    said.add_argument("--dry-run", "-n", action="store_true", help="say what they agree on, write nothing")

    send = command("export", _export, "the kept tiles of a selection as a folder for others, if the copy gate lets them out")
    send.add_argument("run", help="folder of a finished 05_select step, for example outputs/demo/05_select")
    send.add_argument("-o", "--output", default="", metavar="FOLDER", help="new folder; exports/<experiment> by default")
    send.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="keep to these classes")
    send.add_argument("--jsonl", action="store_true", help="metadata.jsonl with captions, as trainers of diffusion models read it")
    send.add_argument("--accept-uncalibrated", action="store_true", help="also where copies cannot be told from chance; the card says so")


def _add_join(command):
    """What a launcher of several processes calls."""
    one = command("join", _join, "one of several processes of a 20_pretrain run: accelerate launch --num_processes N -m histokit join RUN")
    one.add_argument("run", help="folder of the open run, for example outputs/histodiffusion/prior")


def _join(arguments):
    from histokit.fidelity import perceptual
    from histokit.training import data_parallel

    data_parallel.join(arguments.run, lambda weights, device: perceptual.load(weights, device, slopes=True))


def _add_history(command):
    """Commands about what is recorded of runs and tiles."""
    check = command("verify", _verify, "hash the files of a run, or of all runs below a folder, again; exit status 1 if one changed")
    check.add_argument("place", nargs="?", default="outputs", help="run folder, experiment, or outputs (default)")

    trace = command("trace", _trace, "where a synthetic tile comes from: job, base, LoRA, training tiles, cases")
    trace.add_argument("tile", help="picture, tile_id, or sha256 of the picture's file")

    without = command("without-case", _without_case, "everything below outputs/ that a withdrawn patient's tiles touched")
    without.add_argument("case", help="case or patient id, as in the dataset")
    without.add_argument("--dataset", default="", metavar="NAME", help="where two datasets use the same ids")


def _read(arguments):
    from histokit.runs import recipe

    return recipe.read(arguments.recipe, arguments.parameter)


def _study(arguments):
    """The recipe and, after it, its replicates: what --draws and --generator-seeds ask for."""
    from histokit.engine import replicates

    return replicates.study(_read(arguments), arguments.draws, arguments.generator_seeds)


def _parts(arguments):
    """(recipe, step ids to keep to, step ids to redo) of each replicate that has any of them; RecipeError for an id none has."""
    from histokit.runs import recipe

    found = _study(arguments)
    every = list(dict.fromkeys(id for one in found for id in one.steps))
    for id in (*arguments.only, *arguments.force):
        if id not in every:
            raise recipe.RecipeError(f"no step {id!r} in {arguments.recipe}{recipe.nearest(id, every)}")
    for one in found:
        only, force = ([id for id in asked if id in one.steps] for asked in (arguments.only, arguments.force))
        if only or not arguments.only:
            yield one, only, force


def _run(arguments):
    from histokit.engine import terminal

    if arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {arguments.jobs}")
    parts = list(_parts(arguments))
    if arguments.dry_run:
        return terminal.dry_run(parts, arguments.classes)
    return terminal.run(parts, classes=arguments.classes, workers=arguments.jobs, yes=arguments.yes)


def _status(arguments):
    from histokit.engine import terminal

    return terminal.status(_study(arguments))


def _open(arguments):
    import subprocess

    from histokit.core import files, machine
    from histokit.engine import jobs
    from histokit.runs import notebooks, recipe

    read, root = _read(arguments), files.root()
    if arguments.step not in read.steps:
        raise ValueError(f"no step {arguments.step!r} in {arguments.recipe}{recipe.nearest(arguments.step, read.steps)}")
    found = [j for j in jobs.expand(read) if j.step == arguments.step]
    names = [j.class_name for j in found]
    if not found[0].known:
        raise ValueError(f"the classes of {arguments.step} are known after {read.steps[arguments.step].dataset} has run; run that first")
    if len(names) > 1 and not arguments.class_name:
        raise ValueError(f"{arguments.step} runs once per class; say --class and one of: {', '.join(names)}")
    if arguments.class_name and arguments.class_name not in names:
        what = recipe.nearest(arguments.class_name, names) if names != [""] else "; it runs once, without --class"
        raise ValueError(f"{arguments.step} does not run for class {arguments.class_name!r}{what}")
    job = next(j for j in found if j.class_name in (arguments.class_name or names[0],))
    copy = notebooks.write_copy(job.notebook, root / "outputs" / read.experiment / ".open" / f"{job.stem}.ipynb", job.parameters)
    if arguments.print:
        print(copy)
        return 0
    lab = [sys.executable, "-m", "jupyterlab", str(copy), f"--ServerApp.root_dir={root}", "--ContentsManager.allow_hidden=True"]
    lab += ["--no-browser"] if arguments.no_browser else []
    return subprocess.call(lab, env={**machine.KERNEL, **os.environ, "HISTOKIT_ROOT": str(root)})


def _doctor(arguments):
    from histokit.engine import doctor

    return doctor.report(arguments.base)


def _init(arguments):
    from histokit.tiles.ingest import autodescribe

    return autodescribe.draft(arguments.folder, arguments.output)


def _report(arguments):
    from histokit.core import files
    from histokit.runs import places
    from histokit.show import report

    name = "report-share.html" if arguments.share else "report.html"
    path = files.root() / (arguments.output or f"outputs/{arguments.experiment}/{name}")
    files.write_text(path, report.build(arguments.experiment, share=arguments.share))
    print(places.relative(path))


def _new(arguments):
    from histokit.engine import scaffold

    made = scaffold.new(arguments.folder, copy=arguments.copy)
    print(
        f"{arguments.folder}: {', '.join(made)}",
        f"next: cd {shlex.quote(str(arguments.folder))} && histokit run params/demo.yaml",
        sep="\n",
    )


def _compare(arguments):
    from textwrap import shorten

    from histokit.evaluate import compare_experiments

    table = compare_experiments.settings(arguments.one, arguments.other)
    for row in table.itertuples(index=False):
        where = "/".join(filter(None, (row[0], row[1])))
        print(f"{where:24} {row[2]:22} {shorten(str(row[3]), 50)} | {shorten(str(row[4]), 50)}")
    print(f"{len(table) or 'no'} settings differ, {arguments.one} | {arguments.other}\n")
    print(*compare_experiments.paired(arguments.one, arguments.other, arguments.arms)[0], sep="\n")
    print("It was planned by neither recipe, and counts as a look at these test tiles: see it as a hint, and plan the next one.")


def _gallery(arguments):
    from histokit.core import files
    from histokit.runs import places
    from histokit.select import gallery

    step = (files.root() / arguments.run).resolve()
    path = files.root() / arguments.output if arguments.output else step / f"gallery{'-blind' if arguments.blind else ''}.html"
    n = gallery.page(step, path, blind=arguments.blind, seed=arguments.seed)
    print(f"{n} tiles in {places.relative(path)}; it holds pictures of real tiles, so it stays where they may be seen")


def _import_verdicts(arguments):
    from histokit.select import rater_agreement

    table = rater_agreement.read(arguments.files)
    print(*rater_agreement.remarks(table), sep="\n")
    if table.attrs["blind"]:
        print("A blind page asks whether people can tell, not what to keep: nothing was written into the reviews.")
    elif not arguments.dry_run:
        n = rater_agreement.write(table)
        print(f"{n} verdicts into params/reviews/{table.attrs['experiment']}.csv; 05_select follows them when the recipe runs again")


def _verify(arguments):
    from histokit.runs import provenance

    checked, found = provenance.verify(arguments.place)
    for odd in found:
        print(f"{odd.what:10} {odd.run}: {odd.name}")
    print(f"{checked:,} files hashed again, {len(found) or 'nothing'} not as recorded")
    return 1 if found else 0


def _trace(arguments):
    from histokit.runs import provenance

    for found in provenance.trace(arguments.tile):
        print("\n".join(provenance.told(found)))


def _without_case(arguments):
    from histokit.runs import provenance

    found = provenance.without_case(arguments.case, arguments.dataset)
    for row in found.itertuples():
        print(f"{row.tiles or '':>6}  {row.run}: {row.how}")
    if not len(found):
        print(f"no run below outputs/ holds a case or patient {arguments.case!r}")
        return 1
    print(
        "\nTo withdraw it: take its tiles out of the data, delete the folders above and outputs/.cache, then run the recipes again.\n"
        "Files that were copied elsewhere, exported or published are not known here."
    )


def _export(arguments):
    from histokit.core import files
    from histokit.morphology import exchange, prompt_table
    from histokit.runs import places
    from histokit.select import export

    step, outputs = (files.root() / arguments.run).resolve(), (files.root() / "outputs").resolve()
    if outputs not in step.parents:
        raise ValueError(f"{arguments.run} is not below outputs/; name the folder of a step of 05_select or 10_morphology_prompts")
    folder = files.root() / (arguments.output or f"exports/{step.relative_to(outputs).parts[0]}")
    asked = {"accept_uncalibrated": arguments.accept_uncalibrated, "classes": arguments.classes, "jsonl": arguments.jsonl}
    if (step / prompt_table.TABLES[0]).is_file():
        table = exchange.write(step, folder, **asked)
        print(f"{len(table)} captioned tiles in {places.relative(folder)}. These are real tiles of patients: do not pass them on")
        return
    table = export.export(step, folder, **asked)
    print(f"{len(table)} tiles of {table['label'].nunique()} classes in {places.relative(folder)}; read its README.md before it goes out")


if __name__ == "__main__":
    sys.exit(main())
