"""Trains a recipe in a SageMaker training container, where `submit.py` puts it; see README.md.

    hyperparameters   recipe: a file, or a name of `opfa recipes`; the others are keys of the recipe
    channels          data, models and teachers, by the names in container.py
    /opt/ml/checkpoints/run    the run directory; SageMaker keeps it over an interruption
    /opt/ml/model              what becomes model.tar.gz
    /opt/ml/output/failure     why it failed

The same job that starts again resumes. SIGTERM saves first. Fine-tuning is one process.
Pre-training has one for each GPU of each host: torchrun.sh starts them, unless the SDK's torchrun
has done so already.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from container import Job, Task

from opfa.errors import OpfaError, RunError
from opfa.extras import has_or_says
from opfa.storage.runs import RECIPE, RESULTS, model_in

HERE = Path(__file__).resolve().parent
LONGEST = 1000  # characters of a failure's text that SageMaker shows


def process_of(task: Task, job: Job) -> tuple[list[str], dict[str, str]]:
    """The words that train, and variables for them."""
    python = [sys.executable, "-m", "opfa", task.command, str(task.recipe)]
    words = ["--output", str(job.run), *task.words]
    resume = ["--resume"] if (job.run / RECIPE).exists() else []
    settings = {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if job.network and len(job.hosts) > 1:
            settings[name] = os.environ.get(name, job.network)
    if task.command == "finetune" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return [*python, *words, *resume], settings
    if len(job.hosts) > 1:
        place = {"NNODES": len(job.hosts), "NODE_RANK": job.hosts.index(job.host)}
        place |= {"MASTER_ADDR": job.hosts[0], "MASTER_PORT": job.port}
        settings |= {name: str(value) for name, value in place.items()}
    # Beside this file where submit.py puts it, one level up in a clone.
    script = next(d / "torchrun.sh" for d in (HERE, HERE.parent) if (d / "torchrun.sh").exists())
    # It checks, resumes, restarts, and makes RUN/stop of a signal.
    return ["bash", str(script), str(task.recipe), str(job.run), *task.words], settings


class Child:
    """The process that trains; a signal to this one goes on to it, and `was_told` keeps it."""

    def __init__(self) -> None:
        """Nothing runs yet."""
        self.was_told = False
        self._process: subprocess.Popen[str] | None = None
        self._last: deque[str] = deque(maxlen=40)  # lines of its standard error

    def tell(self, *_: object) -> None:
        """Save and end."""
        self.was_told = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def run(self, words: Sequence[str], settings: Mapping[str, str]) -> int:
        """Run it to its end and return its exit code."""
        if self.was_told:
            return -signal.SIGTERM
        print("train.py:", " ".join(words), file=sys.stderr, flush=True)
        environment = {**os.environ, **settings}
        with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
            self._process = process
            if self.was_told:  # in between
                self.tell()
            reader = threading.Thread(target=self._pass_on, args=(process,))
            reader.start()
            status = process.wait()
            reader.join()
        return status

    def _pass_on(self, process: "subprocess.Popen[str]") -> None:
        assert process.stderr is not None, "it was asked for"
        for line in process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            self._last.append(line)

    def said(self) -> str:
        """Its last lines: from the last message of opfa on, where there is one."""
        lines = list(self._last)
        starts = [i for i, line in enumerate(lines) if line.startswith("opfa:")]
        return "".join(lines[starts[-1] :] if starts else lines)[-LONGEST:]


def finish(task: Task, job: Job) -> None:
    """Fill /opt/ml/model, and /opt/ml/output/data with what tells of the run."""
    model = _model_of(job.run)
    job.model.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model, job.model, dirs_exist_ok=True)
    of_run = model.parent if model.name == "model" else job.run
    shutil.copyfile(of_run / RECIPE, job.model / RECIPE)
    data = job.output / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name in (RECIPE, RESULTS, "metrics.jsonl", "environment.json"):
        if (of_run / name).is_file():
            shutil.copyfile(of_run / name, data / name)
    if (of_run / "report").is_dir():
        shutil.copytree(of_run / "report", data / "report", dirs_exist_ok=True)
    if task.command == "finetune" and has_or_says("an endpoint's files", "opfa[export]", "onnx"):
        _add_endpoint(of_run, job.model)


def _add_endpoint(run: Path, directory: Path) -> None:
    """What `opfa pack` puts into an archive; the trained model counts without it too."""
    from opfa.serving.archive import fill

    aside = directory.parent / "endpoint"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        fill(str(run), aside)
        shutil.copytree(aside, directory, dirs_exist_ok=True)
    except OpfaError as error:
        print(f"train.py: no files for an endpoint: {error}", file=sys.stderr)


def _model_of(run: Path) -> Path:
    """The model of a run; of several runs that of the best."""
    best = _best(run)
    return model_in(run / best if best else run)


def _best(run: Path) -> str | None:
    """The best of several finished runs; None where there is one run, or none is finished."""
    results = run / RESULTS
    return json.loads(results.read_bytes()).get("best_run") if results.exists() else None


def tell_failure(text: str) -> None:
    """Write why it failed to where SageMaker looks for it."""
    output = Path(os.environ.get("SM_OUTPUT_DIR", "/opt/ml/output"))
    with contextlib.suppress(OSError):
        (output / "failure").write_text(text[-LONGEST:], encoding="utf-8")


def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tell a failure that is no user's mistake, with its traceback."""
    tell_failure("".join(traceback.format_exception(kind, error, trace)))
    sys.__excepthook__(kind, error, trace)


def main() -> None:
    """Train, and leave with 0 also where SIGTERM ended it: the job goes on, and did not fail."""
    sys.excepthook = hook
    child = Child()
    signal.signal(signal.SIGTERM, child.tell)
    signal.signal(signal.SIGINT, child.tell)
    try:
        _train(child)
    except OpfaError as error:
        print(f"train.py: {error}", file=sys.stderr, flush=True)
        tell_failure(str(error))
        raise SystemExit(error.status) from None


def _train(child: Child) -> None:
    job = Job.of(os.environ)
    task = Task.of(job)
    for name in ("stop", "stopped"):  # what S3 brought back of an earlier interruption
        (job.run / name).unlink(missing_ok=True)
    status = child.run(*process_of(task, job))
    is_done = _is_done(job.run)
    if is_done and job.is_first:
        finish(task, job)
    was_told = child.was_told or (job.run / "stopped").exists()
    if not is_done and was_told:
        print("train.py: stopped; the job resumes where it starts again", file=sys.stderr)
    elif not is_done or status:
        error = RunError(f"opfa {task.command} ended with {status}: {child.said().strip()}")
        error.status = status if status > 0 else 1
        raise error


def _is_done(run: Path) -> bool:
    """Whether a run, or all of a sweep, is finished."""
    return (run / "done.json").exists() or _best(run) is not None


if __name__ == "__main__":
    main()
