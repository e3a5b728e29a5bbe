"""What compressing costs: CPU seconds, memory and disk of every method on one model, the floor of
two plain forward passes, and the best-known peer on the same token ids.

    python benchmarks/compressing.py MODEL --dataset TEXT --results FILE
    python benchmarks/compressing.py MODEL --dataset TEXT --results FILE --methods wanda sparsegpt \
        --against llmcompressor --peer FOLDER

Each figure is of a process of its own (one_run.py), with one thread: user and system seconds as the
kernel counts them for the whole process, its peak resident and anonymous memory, what it had read
from and written to disks, and the CPU seconds of its work by stage. `--against` makes a virtual
environment in FOLDER with the peer, if there is none, and runs both by turns, --repeats times; the
ratio is that of the smallest CPU times. FILE keeps every run: what is in it is not run again, so
that a measurement that was cut off goes on with the same command, and without --methods the table
is printed at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import emit, read

PEER = "llmcompressor==0.14.0.1"
HERE = Path(__file__).parent
METHODS = [
    "magnitude", "wanda", "nowag", "sparsegpt", "armor", "wanda+dsnot", "sparsegpt+lsq",
    "sparsegpt+swap", "sparsegpt+admm", "svd", "welore", "asvd", "svd_llm", "fisher",
]  # fmt: skip
FLOORS = ["float32", "bfloat16"]
KEY = ("kind", "what", "samples", "seq_len", "repeat")


def peer_python(folder: Path) -> str:
    """Python of the environment in `folder`, which is made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", PEER], check=True)
    return str(python)


def token_ids(model: str, dataset: str, samples: int, seq_len: int, path: Path) -> Path:
    """A file of token ids, made once for everybody."""
    if not path.exists():
        from compressor.calibration.tokens import calibration_rows
        from compressor.checkpoint.reader import Reader

        vocabulary = Reader(Path(model)).config["vocab_size"]
        rows = calibration_rows(
            dataset, Path(model), vocabulary, num_samples=samples, seq_len=seq_len, seed=0
        ).tolist()
        path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def measure(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a process to its end; what it cost."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started, peak = time.perf_counter(), [0]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        watcher = threading.Thread(target=_watch, args=(process.pid, peak))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
        watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{(folder / 'log').read_text()[-2000:]}")
    run = json.loads((folder / "run.json").read_text())
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "user": round(usage.ru_utime, 2),
        "system": round(usage.ru_stime, 2),
        "wall": round(wall, 2),
        "peak_rss_mb": round(usage.ru_maxrss * unit / 1e6),
        "peak_anonymous_mb": round(peak[0] * 1024 / 1e6),
        **run,
    }


def _watch(pid: int, peak: list[int]) -> None:
    """Keep the largest anonymous memory of a process, in KiB, until it is gone."""
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        sizes = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        if not sizes:  # it has ended and waits to be asked for
            return
        peak[0] = max(peak[0], int(sizes[0]))
        time.sleep(0.02)


def runs(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int, int]]:
    """What is to be measured: kind, what, samples, repeat; those that are compared by turns."""
    for samples in arguments.samples:
        for repeat in range(arguments.repeats):
            yield from (("forward", dtype, samples, repeat) for dtype in FLOORS)
            for method in arguments.methods:
                kinds = ["compress"]
                if arguments.against and method in ("wanda", "sparsegpt"):
                    kinds.append("peer")
                for kind in kinds[:: -1 if repeat % 2 else 1]:
                    yield kind, method, samples, repeat


def best(rows: list[dict[str, Any]], kind: str, what: str, samples: int) -> dict[str, Any] | None:
    """The run with the smallest CPU time."""
    ours = [r for r in rows if (r["kind"], r["what"], r["samples"]) == (kind, what, samples)]
    return min(ours, key=lambda row: row["user"] + row["system"], default=None)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The best run of everything, as Markdown."""
    yield (
        "| samples | | user s | system s | wall s | peak RSS MB | anonymous MB | read MB | "
        "written MB | of its work |"
    )
    yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|---|"
    for samples, kind, what in dict.fromkeys((r["samples"], r["kind"], r["what"]) for r in rows):
        row = best(rows, kind, what, samples)
        assert row
        name = {"compress": what, "peer": f"llm-compressor {what}", "forward": f"two passes {what}"}
        disk = [f"{row['io'].get(k, 0) / 1e6:.0f}" for k in ("read_bytes", "write_bytes")]
        total = max(sum(row["stages"].values()), 1e-9)
        stages = sorted(row["stages"].items(), key=lambda item: -item[1])
        shares = ", ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in stages)
        yield (
            f"| {samples} | {name[kind]} | {row['user']} | {row['system']} | {row['wall']} | "
            f"{row['peak_rss_mb']} | {row['peak_anonymous_mb']} | {disk[0]} | {disk[1]} | "
            f"{shares if kind == 'compress' else ''} |"
        )


def ratios(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Every method beside the floor, and beside the peer where that was run."""
    for samples, what in dict.fromkeys(
        (r["samples"], r["what"]) for r in rows if r["kind"] == "compress"
    ):
        ours = best(rows, "compress", what, samples)
        assert ours
        said = [f"system {ours['system'] / ours['user']:.1%} of user"]
        for dtype in FLOORS:
            if floor := best(rows, "forward", dtype, samples):
                share = ours["work"] / floor["stages"]["forward"]  # both without imports
                said.append(f"{share:.2f} x the floor in {dtype}")
        if other := best(rows, "peer", what, samples):
            cost = [row["user"] + row["system"] for row in (other, ours)]
            memory = ours["peak_rss_mb"] / other["peak_rss_mb"]
            said.append(f"{cost[0] / cost[1]:.2f} x faster than llm-compressor")
            said.append(f"{memory:.2f} x its peak RSS")
        yield f"{what}, {samples} samples: {'; '.join(said)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder")
    parser.add_argument("--dataset", required=True, help="a text file")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, kept and added to")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--samples", nargs="+", type=int, default=[16])
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", choices=["llmcompressor"])
    parser.add_argument("--peer", type=Path, help="folder of its environment")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in the processes that are measured: the rows say so
    if arguments.against and not arguments.peer:
        parser.error("--against needs --peer, a folder for its environment")
    python = {"compress": sys.executable, "forward": sys.executable}
    if arguments.against:
        python["peer"] = peer_python(arguments.peer.absolute())
    known: dict[tuple[Any, ...], dict[str, Any]] = {**read(arguments.results, KEY)}
    for kind, what, samples, repeat in runs(arguments):
        key = (kind, what, samples, arguments.seq_len, repeat)
        if key in known:
            continue
        ids = token_ids(
            arguments.model, arguments.dataset, samples, arguments.seq_len,
            arguments.results.absolute().with_suffix(f".{samples}x{arguments.seq_len}.ids.jsonl"),
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            words = [kind, what, str(Path(arguments.model).absolute()), str(ids), str(samples)]
            words += [str(arguments.seq_len), scratch]
            command = [python[kind], str(HERE / "one_run.py"), *words]
            known[key] = dict(zip(KEY, key, strict=True)) | measure(command, Path(scratch))
        emit(known[key], arguments.results)
    rows = [row for row in known.values() if row["seq_len"] == arguments.seq_len]
    print("\n".join(["", *table(rows), "", *ratios(rows)]))


if __name__ == "__main__":
    main()
