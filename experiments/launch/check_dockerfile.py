"""Runs the steps of the Dockerfile in a clean virtual environment, without a Docker engine.

    python -m experiments.launch.check_dockerfile --model=onnx_model

COPY copies, RUN runs, each in a folder of this machine instead of the image's; the server is then
started by the ENTRYPOINT, as the USER where this process may become it, and must be found healthy
by the HEALTHCHECK, answer a text and end with status 0 on SIGTERM. What is not checked is the base
image itself: the steps run with this machine's Python. Prints the size of the environment and the
seconds until it is healthy. About half a minute, most of it downloads.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
DOCKERFILE = Path(__file__).with_name("Dockerfile")


class Step(NamedTuple):
    """Holds one instruction, such as RUN, and its text without line breaks."""

    instruction: str
    text: str


def read_steps(dockerfile: Path) -> list[Step]:
    """Returns the instructions of a Dockerfile in order."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Step(*line.split(maxsplit=1)) for line in joined.splitlines() if line]


def last(steps: list[Step], instruction: str) -> str:
    """Returns the text of the last step of that instruction."""
    return [step.text for step in steps if step.instruction == instruction][-1]


def command_of(text: str) -> list[str]:
    """Returns the command of an ENTRYPOINT or a HEALTHCHECK, its JSON list."""
    return json.loads(text[text.index("[") :])


class Image:
    """Stands in for the image: its folders /src and /opt/venv lie in a folder of this machine.

    Attributes:
      folder: that holds them.
      port: of this machine, for the image's 8000.
      environment: variables of its processes.

    """

    def __init__(self, folder: Path, port: int):
        self.folder, self.port = folder, port
        self.base = folder / "base"  # the Python of the base image, with pip
        venv.create(self.base, with_pip=True)
        kept = ("TMPDIR", "PIP_INDEX_URL", "PIP_CONFIG_FILE", "PIP_CERT", "SSL_CERT_FILE")
        self.environment = {name: os.environ[name] for name in kept if name in os.environ}
        self.environment["PATH"] = f"{self.base / 'bin'}:/usr/bin:/bin"
        self.workdir = folder

    def here(self, text: str) -> str:
        """Returns a text with the image's paths and port as they are on this machine."""
        for path in ("/opt/venv", "/src"):
            text = re.sub(rf"(?<![\w.]){path}\b", str(self.folder) + path, text)
        return re.sub(r"\b8000\b", str(self.port), text)

    def build(self, steps: list[Step]) -> None:
        """Carries out the steps that make the image."""
        for step in steps:
            text = self.here(step.text)
            if step.instruction == "WORKDIR":
                self.workdir = Path(text)
                self.workdir.mkdir(parents=True)
            elif step.instruction == "COPY" and not text.startswith("--from"):
                *sources, target = text.split()
                for source in sources:
                    self._copy(ROOT / source, self.workdir / target)
            elif step.instruction == "RUN":
                print(f"RUN {text}", flush=True)
                command = ["sh", "-ec", text]
                subprocess.run(command, cwd=self.workdir, env=self.environment, check=True)
            elif step.instruction == "ENV":
                for name, value in (pair.split("=", 1) for pair in shlex.split(text)):
                    value = value.replace("$PATH", "/usr/bin:/bin")
                    self.environment[name] = value
            elif step.instruction == "ARG":
                name, _, value = text.partition("=")
                self.environment[name] = value.strip('"')

    def _copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def user_of(steps: list[Step]) -> dict[str, Any]:
    """Returns the arguments by which a process runs as the USER, or none and says why."""
    user, group = (int(number) for number in last(steps, "USER").split(":"))
    become: dict[str, Any] = {"user": user, "group": group, "extra_groups": []}
    try:
        subprocess.run([os.path.realpath(sys.executable), "-c", ""], check=True, **become)
    except OSError as error:
        print(f"not as user {user}: {error.strerror}", flush=True)
        return {}
    return become


def check(steps: list[Step], image: Image, model: Path) -> None:
    """Starts the server, and has it found healthy, asked and ended."""
    command = [image.here(part) for part in command_of(last(steps, "ENTRYPOINT"))]
    command[0] = shutil.which(command[0], path=image.environment["PATH"]) or command[0]
    command += [f"--model={model}", "--host=127.0.0.1"]
    probe = [image.here(part) for part in command_of(last(steps, "HEALTHCHECK"))]
    began = time.perf_counter()
    server = subprocess.Popen(command, cwd="/", env=image.environment, **user_of(steps))
    try:
        while subprocess.run(probe, env=image.environment, stderr=subprocess.DEVNULL).returncode:
            assert server.poll() is None, f"the server ended with status {server.returncode}"
            assert time.perf_counter() - began < 60, "not healthy within a minute"
        print(f"healthy after {time.perf_counter() - began:.1f} s, with the probe's own start")
        body = json.dumps({"inputs": "Shares fell on Monday."}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{image.port}/predict", body) as answer:
            print(f"answer: {answer.read().decode()[:100]}")
    finally:
        server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0, f"the server ended with status {server.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of sweet-jax export --format=onnx")
    parser.add_argument("--port", type=int, default=8765, help="a free one (default 8765)")
    options = parser.parse_args()
    steps = read_steps(DOCKERFILE)
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        image = Image(Path(name), options.port)
        image.build(steps)
        files = [path for path in (Path(name) / "opt/venv").rglob("*") if path.is_file()]
        print(f"/opt/venv: {sum(path.lstat().st_size for path in files) / 1e6:.0f} MB")
        check(steps, image, Path(options.model).resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
