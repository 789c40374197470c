"""Which random cases are run, and what is said of one that fails."""

import os
import random


def seeds(few):
    """By default the same few; ``LOOKAHEAD_RANDOM_RUNS`` new ones, or ``LOOKAHEAD_RANDOM_SEED`` once more."""
    if "LOOKAHEAD_RANDOM_SEED" in os.environ:
        return [int(os.environ["LOOKAHEAD_RANDOM_SEED"])]
    if "LOOKAHEAD_RANDOM_RUNS" in os.environ:
        # With pytest-xdist every process has to find the same tests.
        source = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID") or os.urandom(16))
        return [source.randrange(2**32) for _ in range(int(os.environ["LOOKAHEAD_RANDOM_RUNS"]))]
    return list(range(few))


def run(check, case, defaults, allowed):
    """Check a case; if it fails, look for a simpler one that fails in the same way and name it."""
    error = failure(check, case)
    if error is None:
        return
    simple, left = case, 200
    while left:
        for simpler in filter(allowed, _simpler(simple, defaults)):
            left = max(left - 1, 0)
            other = failure(check, simpler) if left else None
            if other is not None and _kind(other) == _kind(error):
                simple, error = simpler, other
                break
        else:
            break
    rest = ", ".join(f"{name}={value!r}" for name, value in simple.items() if value != defaults[name])
    error.add_note(f"The simplest case found that fails in this way: {rest or 'the default'}")
    raise error


def failure(check, case):
    """What goes wrong in a case."""
    try:
        check(case)
    except Exception as error:  # noqa: BLE001 (whatever it is)
        return error
    return None


def _kind(error):
    return type(error), str(error).split()[:1]


def _simpler(case, defaults):
    """The case with one choice fewer, or with one element of a choice fewer."""
    for name, value in case.items():
        shorter = isinstance(value, tuple) and len(value) < len(defaults[name])
        if value != defaults[name] and not shorter:
            yield {**case, name: defaults[name]}
    for name, value in case.items():
        if isinstance(value, tuple) and len(value) > 1:
            for index in range(len(value)):
                yield {**case, name: value[:index] + value[index + 1 :]}
