"""Runs what the documentation shows, line by line as it is told, in one process.

Each line of standard input is a JSON object: `argv` of a `fastvlm` command and its `stdin`, or the
Python `code` of an example and its `page`, whose examples see each other's names. Each is answered
by a line: `status`, `stdout` and `stderr`. One process imports torch and coremltools once, where a
process for each command would take longer to import than to work.
"""

import io
import json
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout

from fastvlm_mlx.__main__ import main
from model_export.layouts import install

# The demo checkpoint's encoder is smaller than the one that the app is written for.
install.app_misfit = lambda info: None

names: dict[str, dict] = {}


def run(told: dict) -> dict:
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            if "code" in told:
                known = names.setdefault(told["page"], {"__name__": "__main__"})
                exec(compile(told["code"], told["page"], "exec"), known)
            else:
                sys.argv = ["fastvlm", *told["argv"]]
                sys.stdin = io.StringIO(told.get("stdin", ""))
                main()
        except SystemExit as left:
            status = left.code or 0
        # Whatever an example raises is the answer: the test shows it, and the next one is told.
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            status = 1
    return {"status": status, "stdout": out.getvalue(), "stderr": err.getvalue()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
