"""The counts of all kills: as a table, and as a file of results."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.faults.phases import PHASES
from sweet_jax.files import write_json


def summarize(rounds: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the counts of some rounds of one mode.

    Seconds are those from the kill of one of several processes until the last of the others had
    ended by itself, of the processes that had found each other.
    """
    rounds = list(rounds)
    kills = [kill for each in rounds for kill in each["kills"]]
    counts = Counter(kill["phase"] for kill in kills)
    waits = sorted(kill["seconds"] for kill in kills if kill.get("joined"))
    said = Counter(text.partition(":")[0] for kill in kills for text in kill.get("said", ()))
    found = {
        "kills": len(kills),
        "runs": len(rounds),
        "runs_with_an_empty_compilation_cache": sum(each["cold"] for each in rounds),
        "phases": {phase: counts[phase] for phase in (*PHASES, "ended") if counts[phase]},
        "victims": dict(Counter(_who(kill["victims"]) for kill in kills)),
        "bits_compared": sum(each["bits"] for each in rounds),
        "differing_bits": sum(each["differing"] for each in rounds),
        "restarts_on_a_busy_machine": sum(each.get("restarts", 0) for each in rounds),
        "files_left_behind": sum(len(each["left"]) for each in rounds),
    }
    if waits:
        found["seconds_until_the_others_ended"] = {
            "n": len(waits),
            "median": round(waits[len(waits) // 2], 1),
            "largest": round(waits[-1], 1),
        }
        found["others_left_waiting"] = sum(kill.get("waiting", 0) for kill in kills)
        found["others_said"] = dict(said)
    return found


def _who(victims: list) -> str:
    if isinstance(victims[0], str):
        return victims[0]
    return "first process" if victims == [0] else "another process" if len(victims) == 1 else "all"


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the counts of every mode that has a round in a work directory."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            rounds.setdefault(record["mode"], []).append(record)
    return {mode: summarize(records) for mode, records in rounds.items()}


def report(folder: Path, output: Path) -> None:
    """Prints the counts as a Markdown table, and writes them to OUTPUT/kills.json.

    A mode that the work directory has no round of keeps the counts that stand there, of another
    day; those of any other are replaced. The sum is of both.
    """
    path = output / "kills.json"
    kept = json.loads(path.read_text())["modes"] if path.exists() else {}
    found = kept | read_all(folder)
    total = {
        key: sum(each[key] for each in found.values())
        for key in ("kills", "runs", "bits_compared", "differing_bits")
    }
    write_json(path, {"total": total, "modes": found})
    columns = [*PHASES, "ended"]
    print("| mode | kills | runs | differing bits | " + " | ".join(columns) + " |")
    print("| --- " * (4 + len(columns)) + "|")
    for mode, each in found.items():
        numbers = [each["phases"].get(phase, 0) for phase in columns]
        cells = [mode, each["kills"], each["runs"], each["differing_bits"], *numbers]
        print("| " + " | ".join(map(str, cells)) + " |")
    print(
        f"\n{total['kills']} kills in {total['runs']} runs: {total['differing_bits']} of "
        f"{total['bits_compared']} bits differ"
    )
