"""The campaign: sound inputs are spoiled in many ways, and every command has to end in one sentence.

    python tests/robustness/fuzz.py [--cases 3000] [--seed 0] [--only NAME ...] [--engine CHECKOUT] [--lines FILE]
                                     [--again FILE]

One warm process forks for each case, which gets 20 seconds of its processor, as many of waiting for something, and 1 GB
beyond what it had; what others compute meanwhile is not its fault. Prints a table by generator and the causes found,
and writes a JSON line a case; exit code 1 where a promise was broken: no traceback, no hang, no memory beyond, no file
outside the case's folder, no code of a stranger's, no script in a page, no file of this machine in a result, no control
character on the terminal. Not for Windows, which cannot fork.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS, BYTES = 20.0, 1 << 30
PATIENCE = 15  # times as long by the clock, on a machine that others use too
REFUSED, FINE = (2,), (0, 1, 130)
SECRET = "hidden-words-of-this-machine"
FAULTS = ("traceback", "hang", "memory", "crash", "code", "outside", "leak", "script", "control", "leftover")
PICTURE = "\ufffdPNG\n\x1a\n"  # of --out -, as text
FRAME = re.compile(r'File "[^"]*(ip2p_engine/[^"]+)", line \d+, in (\w+)')


def main() -> int:
    options = parsed()
    sys.path[:0] = [str(options.engine), str(HERE)]
    root = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        warm_up(root, options.seeds)
        return try_all(root, options)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def try_all(root: Path, options: argparse.Namespace) -> int:
    """The cases that are asked for, in a process that is warm, and their table; 1 if a promise was broken."""
    from hostile_inputs import GENERATORS

    names = options.only or sorted(GENERATORS)
    results = list(_campaign(root, options, names))
    sys.stdout.write(_table(results, names))
    return int(any(result["faults"] for result in results))


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--engine", type=Path, default=HERE.parents[1])
    parser.add_argument("--lines", type=Path, help="a JSON line a case; a run goes on from it")
    parser.add_argument("--seeds", type=Path, help="sound inputs of an earlier run, or where to keep them")
    parser.add_argument("--again", type=Path, metavar="FILE", help="only the cases that broke a promise in these lines")
    parser.add_argument("--keep-going", type=float, default=1e9, metavar="S", help="stop after so many seconds")
    return parser.parse_args(arguments)


def warm_up(root: Path, made: Path | None = None) -> None:
    """Everything imported and every sound input made, those in a process of its own so that no thread is left here.

    ``made``: where the inputs are taken from, or kept for another run.
    """
    os.environ.update(HF_HUB_OFFLINE="1", IP2P_CACHE=str(root / "cache"), HOME=str(root / "home"), OMP_NUM_THREADS="1")
    os.environ["MPLCONFIGDIR"] = str(root / "cache")
    import torch

    torch.set_num_threads(1)
    import ip2p_engine
    from ip2p_engine.cli import main as command

    for module in pkgutil.walk_packages(ip2p_engine.__path__, "ip2p_engine."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("home", "work", "seeds"):
        (root / name).mkdir()
    from seeds import make_seeds

    if made and made.exists():
        shutil.copytree(made, root / "seeds", dirs_exist_ok=True)
    else:
        process = os.fork()
        if not process:
            for stream in (1, 2):
                os.dup2(os.open(root / "seeds.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            leave(lambda: make_seeds(root / "seeds", command, Path(ip2p_engine.__file__).parents[1]) or 0)
        if os.waitpid(process, 0)[1]:
            raise SystemExit((root / "seeds.log").read_text())
        if made:
            shutil.copytree(root / "seeds", made)
    # Once here, so that the tokenizer and the like are not made anew in every fork.
    for path, layout in (("model.safetensors", "ldm"), ("model", "diffusers")):
        with redirect_stdout(io.StringIO()):
            command(["convert", str(root / "seeds" / "tiny"), str(root / "home" / path), "--to", layout])


def leave(work: Any) -> None:
    """Run in a fork, and end it without what the parent would do at its end."""
    code = 70
    try:
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 70
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _campaign(root: Path, options: argparse.Namespace, names: list[str]) -> Iterator[dict[str, Any]]:
    """The cases that ``--lines`` holds already, then those that it lacks."""
    started = time.monotonic()
    done = _known(options.lines, names)
    yield from done.values()
    asked = [(names[number % len(names)], options.seed * 1_000_003 + number) for number in range(options.cases)]
    if options.again:
        asked = [(one["generator"], one["case"]) for one in _known(options.again, names).values() if one["faults"]]
    with options.lines.open("a") if options.lines else open(os.devnull, "w") as lines:
        for name, case in asked:
            if time.monotonic() - started > options.keep_going:
                break
            if case in done:
                continue
            result = _case(root, name, case)
            lines.write(json.dumps(result) + "\n")
            lines.flush()
            yield result


def _known(path: Path | None, names: list[str]) -> dict[int, dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    return {result["case"]: result for result in found if result["generator"] in names}


def _case(root: Path, name: str, number: int) -> dict[str, Any]:
    """One case; what stands under ``root`` but outside its folder must be the same afterwards."""
    from hostile_inputs import GENERATORS, Case

    level = root / "work"
    place = level / "case"
    place.mkdir()
    (level / "secret.txt").write_text(SECRET)
    (place / "secret.txt").write_text(SECRET)
    case = Case(place=place, seeds=root / "seeds", rng=random.Random(f"{name} {number}"))
    arguments = [str(one) for one in GENERATORS[name](case)]
    before = _outside(root)
    hidden = _hidden(place)
    ended = _forked(root, place, arguments, case.environment)
    out, error = ((root / one).read_text(errors="replace") for one in ("out.txt", "err.txt"))
    faults = list(_faults(ended, out, error))
    if (level / "canary").exists():
        faults.append("code")
    if _outside(root) != before:
        faults.append("outside")
    faults += _in_results(place, arguments)
    if ended["code"] in REFUSED and _hidden(place) - hidden:
        faults.append("leftover")
    frames = FRAME.findall(error)
    what = error.strip().splitlines()[-1][:300] if error.strip() else ""
    cause = f"{what.partition(':')[0][:60]} in {'/'.join(frames[-1])}" if "traceback" in faults and frames else ""
    for one in sorted(root.iterdir()):
        if one.name not in ("seeds", "home", "seeds.log", "work"):
            shutil.rmtree(one, ignore_errors=True) if one.is_dir() else one.unlink()
    shutil.rmtree(level)
    level.mkdir()
    return {
        "generator": name,
        "case": number,
        "arguments": arguments,
        "environment": case.environment,
        **ended,
        "faults": faults,
        "cause": cause,
        "said": what,
    }


def _forked(root: Path, place: Path, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command in a fork; it is ended when its time or its memory is over."""
    from ip2p_engine.cli import main as command

    started, before = time.monotonic(), _resident(os.getpid())
    process = os.fork()
    if not process:
        os.setsid()
        os.chdir(place)
        os.environ.update(environment)
        for stream, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        leave(lambda: command(arguments))
    most, why, busy, computed = 0, "", started, 0.0
    while True:
        done, status, used = os.wait4(process, os.WNOHANG)
        if done:
            break
        most = max(most, _resident(process) - before)
        now, before_now, computed = time.monotonic(), computed, _computed(process)
        busy = now if computed > before_now or _runnable(process) else busy
        late = computed > SECONDS or now - busy > SECONDS or now - started > PATIENCE * SECONDS
        why = "hang" if late else "memory" if most > BYTES else ""
        if why:
            os.killpg(process, signal.SIGKILL)
            _, status, used = os.wait4(process, 0)
            break
        time.sleep(0.02)
    return {
        "code": None if why else os.waitstatus_to_exitcode(status),
        "why": why,
        "computed": round(used.ru_utime + used.ru_stime, 2),
        "seconds": round(time.monotonic() - started, 2),
        "megabytes": most >> 20,
    }


def _resident(process: int) -> int:
    """Bytes of its own; of a fork those of files are not mapped at once, and would hide as much."""
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{process}/statm").read_text().split())
        return (resident - shared) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _runnable(process: int) -> bool:
    """Whether it would compute if it were its turn."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("R", "D")
    except (OSError, IndexError):
        return False


def _computed(process: int) -> float:
    """Seconds of its processor, as others may be busy on the machine."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def _faults(ended: dict[str, Any], out: str, error: str) -> Iterator[str]:
    if ended["why"]:
        yield ended["why"]
    elif "Traceback (most recent call last)" in error:
        yield "traceback"
    elif ended["code"] not in (*REFUSED, *FINE):
        yield "crash"
    if ("\x1b" in out and not out.startswith(PICTURE)) or "\x1b" in error.replace("\x1b[A", ""):  # the bars' own way up
        yield "control"


def _outside(root: Path) -> list[str]:
    """Names that a case must not add: beside its folder, beside the inputs, and in the home."""
    known = ("seeds", "out.txt", "err.txt", "cache")
    beside = [str(path) for path in (root / "work" / "case").glob("*escaped*")]  # where a command writes, but not --out
    return beside + sorted(
        str(path)
        for folder in (root, root / "work", root / "home")
        for path in folder.iterdir()
        if path.name not in known
    )


def _hidden(place: Path) -> set[str]:
    """Names of unfinished work, which a command that ends by itself must not leave."""
    found = (path for path in place.rglob(".*") if not path.name.endswith(".lock"))
    return {str(path) for path in found if path.name.endswith((".part", ".tmp", ".old", ".new"))}


def _in_results(place: Path, arguments: list[str]) -> Iterator[str]:
    import base64

    pages = [path for path in place.rglob("*.html") if path.is_file() and path.stat().st_mtime]
    texts = [path.read_text(errors="replace") for path in pages]
    secret = base64.b64encode(SECRET.encode())[:20].decode()
    if any(SECRET in text or secret in text for text in texts):
        yield "leak"
    if any("<script>alert" in text for text in texts):
        yield "script"


def _table(results: list[dict[str, Any]], names: list[str]) -> str:
    rows = [("generator", "cases", "done", "refused", *FAULTS, "slowest s", "most MB")]
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["generator"]].append(result)
    for name, group in [*((name, groups[name]) for name in names if name in groups), ("all", results)]:
        found = Counter(fault for result in group for fault in result["faults"])
        sound = [result for result in group if not result["faults"]]
        refused = sum(result["code"] in REFUSED for result in sound)
        slow, large = (max(result[key] for result in group) for key in ("computed", "megabytes"))
        counts = [str(found[fault]) for fault in FAULTS]
        rows.append(
            (name, str(len(group)), str(len(sound) - refused), str(refused), *counts, f"{slow:.1f}", str(large))
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    causes = Counter(result["cause"] for result in results if result["cause"])
    return (
        "\n".join([*lines, "", f"{len(causes)} causes", *(f"{n} x {cause}" for cause, n in causes.most_common())])
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
