"""Counts all kills, as a table and as a file of results."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.faults.kills import read_records
from experiments.faults.phases import PHASES
from sweet_jax.files import read_json, write_json


def summarize(rounds: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the counts of rounds of one mode.

    Seconds are those from the kill of one of several processes until all others had ended by
    themselves, if the processes were connected.
    """
    rounds = list(rounds)
    kills = [kill for each in rounds for kill in each["kills"]]
    counts = Counter(kill["phase"] for kill in kills)
    waits = sorted(kill["seconds"] for kill in kills if kill.get("joined"))
    said = Counter(text.partition(":")[0] for kill in kills for text in kill.get("said", ()))
    summary: dict[str, Any] = {
        "kills": len(kills),
        "runs": len(rounds),
        "runs_with_an_empty_compilation_cache": sum(each["cold"] for each in rounds),
        "phases": {phase: counts[phase] for phase in (*PHASES, "ended") if counts[phase]},
        "victims": dict(Counter(_describe(kill["victims"]) for kill in kills)),
        "bits_compared": sum(each["bits"] for each in rounds),
        "differing_bits": sum(each["differing"] for each in rounds),
        "restarts_on_a_busy_machine": sum(each.get("restarts", 0) for each in rounds),
        "files_left_behind": sum(len(each["left"]) for each in rounds),
    }
    if waits:
        summary["seconds_until_the_others_ended"] = {
            "n": len(waits),
            "median": round(waits[len(waits) // 2], 1),
            "largest": round(waits[-1], 1),
        }
        summary["others_left_waiting"] = sum(kill.get("waiting", 0) for kill in kills)
        summary["others_said"] = dict(said)
    return summary


def _describe(victims: list[Any]) -> str:
    """Returns who was killed; victims are numbers of processes, or on Ray one name."""
    if isinstance(victims[0], str):
        return victims[0]
    if len(victims) > 1:
        return "all"
    return "first process" if victims == [0] else "another process"


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the counts of every mode that has rounds in a work directory."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for record in read_records(path):
            rounds.setdefault(record["mode"], []).append(record)
    return {mode: summarize(records) for mode, records in rounds.items()}


def report(folder: Path, output: Path) -> None:
    """Prints the counts as a Markdown table, and writes them to OUTPUT/kills.json.

    Modes without rounds in the work directory keep the counts that the file has already; those of
    the other modes are replaced. The total includes both.
    """
    path = output / "kills.json"
    earlier = read_json(path)["modes"] if path.exists() else {}
    modes = earlier | read_all(folder)
    total = {
        key: sum(each[key] for each in modes.values())
        for key in ("kills", "runs", "bits_compared", "differing_bits")
    }
    write_json(path, {"total": total, "modes": modes})
    columns = [*PHASES, "ended"]
    print("| mode | kills | runs | differing bits | " + " | ".join(columns) + " |")
    print("| --- " * (4 + len(columns)) + "|")
    for mode, each in modes.items():
        numbers = [each["phases"].get(phase, 0) for phase in columns]
        cells = [mode, each["kills"], each["runs"], each["differing_bits"], *numbers]
        print("| " + " | ".join(map(str, cells)) + " |")
    print(
        f"\n{total['kills']} kills in {total['runs']} runs: {total['differing_bits']} of "
        f"{total['bits_compared']} bits differ"
    )
