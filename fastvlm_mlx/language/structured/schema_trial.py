"""A schema as llguidance's grammar, and a trial of it in a process that may fail.

Some schemas take llguidance hours, gigabytes or all of a stack, whatever limits it is given: twenty
patterns in one `allOf`, a thousand definitions that refer to each other in a row. Nothing can stop
a thread that compiles one, so what has not been tried is tried first by this file, run as a script
(which is why it imports nothing of ours), in a process with limits.
"""

from __future__ import annotations

import resource
import sys
import threading
from typing import Any

# Processor seconds and bytes of a trial; a schema of a hundred types takes 0.1 s.
SECONDS, MEMORY = 2, 2**30
# Stacks that grammars are compiled on: the trial's is smaller, so what it takes never fails later.
STACK, TRIAL_STACK = 64 * 2**20, 32 * 2**20

# What a grammar may build of expressions, at once and for a token. llguidance's own limit of a
# million lets one token take a second; an enumeration of 10,000 texts needs less than this.
_FUEL = 200_000
# The size is the whole process's, for threads that begin.
_STACK_SIZE = threading.Lock()

# One line, and never more than one space: a model that may write space can write it for ever. The
# escapes are those that have a letter. `\u000a` would be another way to write `\n`, so that an
# object's key could be written twice, once as if it were none of the schema's.
_FORM: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": 'nrbtf\\"',
    "coerce_one_of": False,
    "lenient": False,
}


def matcher(tokenizer: Any, schema: str) -> Any:
    """llguidance's matcher of a schema's JSON; whether it has failed, it says itself."""
    import llguidance

    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_FORM)
    limits = llguidance.LLParserLimits(initial_lexer_fuel=_FUEL, verbose_errors=False)
    made = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not made.is_error():
        # That nothing at all meets the schema may show no sooner than here.
        made.compute_bitmask()
    return made


def on_large_stack(task: Any, stack: int = STACK) -> Any:
    """What `task` returns or raises, run by a thread whose stack is that large."""
    ended: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            ended.append((task(), None))
        # Raised again where it is waited for.
        except BaseException as error:  # noqa: BLE001
            ended.append((None, error))

    thread = threading.Thread(target=run)
    with _STACK_SIZE:
        before = threading.stack_size(stack)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    returned, error = ended[0]
    if error is not None:
        raise error
    return returned


def _main() -> None:
    """Say what is wrong with the schema on standard input; nothing where it can be used."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # After the standard library: what lies beside llguidance must not take the place of it.
    sys.path.append(sys.argv[1])
    import llguidance

    tokenizer = llguidance.LLTokenizer("byte")
    schema = sys.stdin.buffer.read().decode()
    tried = on_large_stack(lambda: matcher(tokenizer, schema), TRIAL_STACK)
    sys.stdout.buffer.write(tried.get_error().encode())


if __name__ == "__main__":
    _main()
