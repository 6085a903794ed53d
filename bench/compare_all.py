"""The full matrix of the comparison, and docs/results.md from what it found: `make results`.

python bench/compare_all.py [--subjects demo,stories260K] [--arms all] [--seeds 0,1,2] [--ratio 0.25]
python bench/compare_all.py --page-only
"""

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from results_page import RESULTS, shown_evidence, write_page

from trsp_fast.data import standard_library

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# name -> (model, text to calibrate and evaluate on, text of another domain); what lies beside the checkout is optional
SUBJECTS: dict[str, tuple[str, str, str | None]] = {
    "demo": ("demo", "demo", str(SHARED / "text" / "wikitext-2.test.txt")),
    "stories260K": (
        str(SHARED / "stories260K"),
        str(SHARED / "text" / "tinystories_val_68stories.txt"),
        str(SHARED / "text" / "tinyshakespeare.txt"),
    ),
}


def run(name: str, arguments: argparse.Namespace, ends: float) -> bool:
    """One subject into bench/results/compare_NAME.json, without paths of this machine; whether anything is there.

    Args:
        ends: when to stop, by `time.monotonic`.
    """
    model, data, other = SUBJECTS.get(name) or (arguments.folder[name], "demo", SUBJECTS["demo"][2])
    if not all(source == "demo" or Path(source).exists() for source in (model, data)):
        print(f"{name}: {model} or {data} is not there; left out")
        return True
    out = Path(arguments.out or tempfile.mkdtemp(prefix="compare-")) / name
    if arguments.unseen:
        data = unseen_text(out.parent)
    command = [sys.executable, "-m", "trsp_fast", "compare", model, "--data", data, "--arms", arguments.arms]
    command += ["--eval-data", other] if other and Path(other).exists() else []
    command += [part for setting in arguments.set for part in ("--set", setting)]
    amount, amounts = "--ratio", arguments.ratio
    if arguments.num_layers:
        amount, amounts = "--num-layers", arguments.num_layers
    shares = [(arguments.seeds, amounts)]
    if arguments.jobs > 1:
        shares = [(seed, one) for seed in arguments.seeds.split(",") for one in amounts.split(",")]
    folders = [out.with_name(f"{name}-{index}") for index in range(len(shares))] if len(shares) > 1 else [out]

    def compare(share: tuple[str, str], folder: Path) -> None:
        left = ends - time.monotonic()
        if (folder / "comparison.json").exists() or left <= 0:  # the first: of an interrupted run of this script
            return
        asked = ["--seeds", share[0], amount, share[1], "--out", str(folder), "--resume"]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([*command, *asked], check=True, timeout=None if math.isinf(left) else left)

    with ThreadPoolExecutor(arguments.jobs) as threads:
        list(threads.map(compare, shares, folders))
    finished = [folder for folder in folders if (folder / "comparison.json").exists()]
    print(f"{name}: {len(finished)} of {len(folders)} comparisons are finished")
    if not finished:
        return False
    merged = _joined([json.loads((folder / "comparison.json").read_text()) for folder in finished], data)
    text = json.dumps(merged).replace(str(SHARED), "../shared/data")
    if arguments.unseen:
        text = text.replace(json.dumps(data)[1:-1], "Python sources that the model was not trained on")
    if name in arguments.folder:
        text = text.replace(json.dumps(model)[1:-1], name)
    values = json.loads(text)
    words = sys.argv[1:]
    if "--out" in words:  # where it waited for its end says nothing
        del words[words.index("--out") : words.index("--out") + 2]
    command_line = "python bench/compare_all.py " + shlex.join(words)
    for subject, folder in arguments.folder.items():
        command_line = command_line.replace(shlex.quote(f"{subject}={folder}"), f"{subject}=FOLDER")
    values["command"] = command_line
    values["evidence"] = shown_evidence(values)
    target = RESULTS / f"{arguments.prefix}_{name}{told_apart(arguments)}{arguments.suffix}.json"
    target.write_text(json.dumps(values, indent=1) + "\n")
    for folder in finished if len(finished) == len(folders) else ():  # else the next call joins them again
        shutil.rmtree(folder)
    print(target)
    return True


def told_apart(arguments: argparse.Namespace) -> str:
    """What tells a result from the usual one of its subject."""
    rates = [setting.removeprefix("transfer.lr=") for setting in arguments.set if setting.startswith("transfer.lr=")]
    rate = f"_{rates[-1]}" if arguments.prefix == "rate" and rates else ""
    return rate + ("_unseen" if arguments.unseen else "")


def unseen_text(folder: Path) -> str:
    """A file with what was held out when the models of Python sources were trained; of it again a tenth is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "unseen.txt"
    path.write_text("\n\n".join(standard_library("held-out")), encoding="utf-8")
    return str(path)


def _joined(parts: list[dict[str, Any]], data: str) -> dict[str, Any]:
    """One comparison of several seeds and amounts; what removes nothing is in each of a seed's, and told once."""
    joined = parts[0]
    alike = all(part.get(what) == joined.get(what) for part in parts for what in ("config", "about_arms"))
    if not alike or any(part["data"] != data for part in parts):
        sys.exit("the folder of --out holds comparisons with other settings, arms or data; give another one.")
    for kind in ("arms", "problems"):
        once: dict[tuple[str, int, int], dict[str, Any]] = {}
        for entry in (entry for part in parts for entry in part[kind]):
            once.setdefault((entry["arm"], entry["seed"], entry["removed"]), entry)
        joined[kind] = list(once.values())
    first = joined["arms"][0]["seed"]
    for part in (part for part in parts if part["arms"][0]["seed"] == first):
        joined["evidence"] |= part["evidence"]
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=FOLDER", help="one more subject, trained on demo's text"
    )
    parser.add_argument("--arms", default="all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ratio", default="0.25")
    parser.add_argument("--num-layers")
    parser.add_argument("--set", action="append", default=[], help="as of trsp-fast compare")
    parser.add_argument(
        "--unseen", action="store_true", help="calibrate models of Python sources on files they were not trained on"
    )
    parser.add_argument(
        "--prefix",
        default="compare",
        choices=("compare", "choice", "rate"),
        help="of the results file: choice and rate are for tables of the README, a rate's file is named by it",
    )
    parser.add_argument("--suffix", default="", help="of the results file, for another budget of the same subject")
    parser.add_argument("--out", help="folder for unfinished comparisons, so that a killed one goes on")
    parser.add_argument(
        "--jobs", type=int, default=1, help="more than 1: every seed and amount in a process, so many at a time"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="then stop, with what is finished; the rest stays in --out"
    )
    parser.add_argument("--page-only", action="store_true", help="write docs/results.md from what is there")
    arguments = parser.parse_args()
    for pair in arguments.model:
        if not Path(pair.partition("=")[2] or "no folder").is_dir():
            parser.error(f"--model is {pair!r}; give a name, = and a folder that is there.")
    arguments.folder = dict(pair.split("=", 1) for pair in arguments.model)
    names = [*arguments.folder, *filter(None, arguments.subjects.split(","))]
    for name in names:
        if name not in arguments.folder and name not in SUBJECTS:
            parser.error(f"there is no subject {name!r}; give some of {', '.join(SUBJECTS)}, or --model.")
    if arguments.unseen and "stories260K" in names:
        parser.error("--unseen is for models of Python sources; stories260K is calibrated on unseen stories anyway.")
    ends = time.monotonic() + arguments.budget if arguments.budget else math.inf
    try:
        found = arguments.page_only or all([run(name, arguments, ends) for name in names])
    except subprocess.CalledProcessError as error:
        sys.exit(f"a comparison ended with {error.returncode}, for the reason above; what is finished stays in --out.")
    print(write_page())
    sys.exit(not found)


if __name__ == "__main__":
    main()
