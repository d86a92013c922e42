"""Runs the steps of the Dockerfile in a clean virtual environment, without a Docker engine.

    python -m experiments.launch.check_dockerfile --model=onnx_model

Executes each COPY and RUN in a folder of this machine instead of the image's. Then starts the
server by the ENTRYPOINT, as the USER if this process is allowed to. The server must be healthy
according to the HEALTHCHECK, classify a text, and end with status 0 on SIGTERM. The base image
itself is not checked, because the steps run with this machine's Python. Prints the size of the
environment and the seconds until the server is healthy. Takes about half a minute, mostly for
downloads.
"""

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

from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.errors import UserError

ROOT = Path(__file__).parents[2]
DOCKERFILE = Path(__file__).with_name("Dockerfile")


class Step(NamedTuple):
    """Holds one instruction, such as RUN, and its arguments as one line."""

    instruction: str
    text: str


def read_steps(dockerfile: Path) -> list[Step]:
    """Returns the instructions of a Dockerfile in order."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Step(*line.split(maxsplit=1)) for line in joined.splitlines() if line]


def last(steps: list[Step], instruction: str) -> str:
    """Returns the text of the last step with an instruction."""
    return [step.text for step in steps if step.instruction == instruction][-1]


def command_of(text: str) -> list[str]:
    """Returns the command of an ENTRYPOINT or a HEALTHCHECK, given its text with a JSON list."""
    return json.loads(text[text.index("[") :])


class Image:
    """Takes the place of the image: has its folders /src and /opt/venv in a folder of this machine.

    Attributes:
      folder: folder that contains them.
      port: port of this machine, in place of the image's 8000.
      base: the Python of the base image, with pip.
      environment: environment variables of its processes.
      workdir: current directory of its processes.

    """

    def __init__(self, folder: Path, port: int):
        self.folder, self.port = folder, port
        self.base = folder / "base"
        venv.create(self.base, with_pip=True)
        kept = ("TMPDIR", "PIP_INDEX_URL", "PIP_CONFIG_FILE", "PIP_CERT", "SSL_CERT_FILE")
        self.environment = {name: os.environ[name] for name in kept if name in os.environ}
        self.environment["PATH"] = f"{self.base / 'bin'}:/usr/bin:/bin"
        self.workdir = folder

    def translate(self, text: str) -> str:
        """Returns a text with the image's paths and port replaced by those of this machine."""
        for path in ("/opt/venv", "/src"):
            text = re.sub(rf"(?<![\w.]){path}\b", str(self.folder) + path, text)
        return re.sub(r"\b8000\b", str(self.port), text)

    def build(self, steps: list[Step]) -> None:
        """Executes the steps that build the image."""
        for step in steps:
            text = self.translate(step.text)
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


def user_arguments(steps: list[Step]) -> dict[str, Any]:
    """Returns arguments of `subprocess.Popen` for the USER; none, with a note, if not allowed."""
    user, group = (int(number) for number in last(steps, "USER").split(":"))
    arguments: dict[str, Any] = {"user": user, "group": group, "extra_groups": []}
    try:
        subprocess.run([os.path.realpath(sys.executable), "-c", ""], check=True, **arguments)
    except OSError as error:
        print(f"the server does not run as user {user}: {error.strerror}", flush=True)
        return {}
    return arguments


def check(steps: list[Step], image: Image, model: Path) -> None:
    """Starts the server, waits until it is healthy, sends a text, and ends it.

    Raises UserError if one of these fails.
    """
    command = [image.translate(part) for part in command_of(last(steps, "ENTRYPOINT"))]
    command[0] = shutil.which(command[0], path=image.environment["PATH"]) or command[0]
    command += [f"--model={model}", "--host=127.0.0.1"]
    probe = [image.translate(part) for part in command_of(last(steps, "HEALTHCHECK"))]
    start = time.perf_counter()
    server = subprocess.Popen(command, cwd="/", env=image.environment, **user_arguments(steps))
    try:
        while subprocess.run(probe, env=image.environment, stderr=subprocess.DEVNULL).returncode:
            if server.poll() is not None:
                raise UserError(f"the server ended with status {server.returncode}")
            if time.perf_counter() - start > 60:
                raise UserError("the server is not healthy after a minute")
        seconds = time.perf_counter() - start
        print(f"healthy after {seconds:.1f} s, including the start of the probe")
        body = json.dumps({"inputs": "Shares fell on Monday."}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{image.port}/predict", body) as response:
            print(f"response: {response.read().decode()[:100]}")
    finally:
        server.send_signal(signal.SIGTERM)
    if server.wait(60) != 0:
        raise UserError(f"the server ended with status {server.returncode} on SIGTERM")


def main(argv: list[str] | None = None) -> None:
    """Builds the environment and checks the server."""
    parser = ArgumentParser("experiments.launch.check_dockerfile", __doc__ or "")
    text = "folder from sweet-jax export --format=onnx"
    parser.add_argument("--model", required=True, help=text)
    text = "port of the server, a free one (default 8765)"
    parser.add_argument("--port", type=int, default=8765, help=text)
    options = parser.parse_args(argv)
    if not (Path(options.model) / "exits.json").is_file():
        raise UserError(f"--model={options.model!r} is not a model exported by sweet-jax export")
    steps = read_steps(DOCKERFILE)
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        image = Image(Path(name), options.port)
        image.build(steps)
        files = [path for path in (Path(name) / "opt/venv").rglob("*") if path.is_file()]
        print(f"/opt/venv: {sum(path.lstat().st_size for path in files) / 1e6:.0f} MB")
        check(steps, image, Path(options.model).resolve())


if __name__ == "__main__":
    sys.exit(run_command(main))
