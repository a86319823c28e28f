"""One job in a process of its own: a notebook through papermill, and one JSON line about how it ended.

Started by `batch` as `python -m histokit.engine.worker [LINE]`, with the job as a line of JSON on stdin and, where kernels start warm, the
number of a socket to `warm`. Stdin stays open while the parent lives; when it closes, the parent is gone (killed, or its terminal closed)
and the kernel must not write on alone.
"""

import json
import os
import sys
import threading

from histokit.engine import warm


def main(line=""):
    job = json.loads(sys.stdin.readline())
    if line:
        warm.use(int(line))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump(execute(job), file)


def execute(job):
    """Run the notebook; {} when papermill is content, else the exception's name, its text and the cell."""
    import papermill

    escaped = [job[key].replace("{", "{{").replace("}", "}}") for key in ("notebook", "target")]  # papermill formats paths
    try:
        papermill.execute_notebook(
            *escaped,
            job["parameters"],
            kernel_name="python3",
            cwd=job["root"],
            progress_bar=False,
            start_timeout=180,
            coalesce_streams=True,  # a progress bar is one output, not two hundred
        )
        return {}
    except papermill.PapermillExecutionError as error:
        return {"error": error.ename, "text": error.evalue, "cell": error.exec_count}
    except Exception as error:
        dead = type(error).__name__ == "DeadKernelError"
        text = "the kernel died; the usual cause is memory, of the machine or of the GPU" if dead else str(error)
        return {"error": type(error).__name__, "text": text, "cell": None}


def _die_with_parent():
    sys.stdin.read()
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
