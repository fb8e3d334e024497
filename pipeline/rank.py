"""One trainer rank: `python -m pipeline.rank RUN_DIR`, started by torchrun; on one node `boresight run` does that.

The first rank prints; what the others would print goes to stderr. The first that fails writes down why, and ends with
the exit code that `boresight` has for it; torchrun then ends the others. None outlives torchrun.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

LOCKED = "BORESIGHT_RANKS_LOCKED"  # set where the process that started torchrun holds the run directory's lock


def end_with_the_parent() -> None:
    """Kill this process when the one that started it is gone: a rank would wait for ever in a collective."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def leave_word(path: Path, message: str, code: int) -> bool:
    """Write down what this rank failed with, unless another rank did before; returns whether it was the first."""
    text = json.dumps({"message": message, "code": code})
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def main() -> None:
    """Join the others and train; exit code 0, 2 for a known failure, 3 for a crash."""
    end_with_the_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # one that waits for others could not handle it
        signal.signal(number, signal.SIG_DFL)
    for category in (FutureWarning, DeprecationWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", category=category)
    if os.environ["RANK"] != "0":
        os.dup2(2, 1)

    from pipeline.config import load_config
    from pipeline.lock import hold
    from pipeline.run_dir import RunDir
    from pipeline.training import train_here
    from quant.errors import BoresightError
    from train.distributed import World

    run = RunDir(Path(sys.argv[1]))
    code, message = 0, ""
    try:
        world = World.join()
        if world.first and LOCKED not in os.environ:
            hold(run.root)
        train_here(run, load_config(run.config), world)
    except BoresightError as error:
        code, message = 2, str(error)
    except BaseException:  # noqa: BLE001 (whatever it is, it must be left behind for the parent)
        code, message = 3, traceback.format_exc()
    if code == 0:
        return
    if leave_word(run.ranks_error, message, code):
        print(f"rank failed: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what other ranks still wait for would hold up an orderly end


if __name__ == "__main__":
    main()
