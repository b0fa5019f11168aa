"""What is installed: one top-level package, with the folders that the repository keeps at its top inside it."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from places import ROOT

LINKED = ("kernels", "drafters", "training")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    """The files of a wheel that is built from a copy, so that no build folder is left in the repository."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    source, out = tmp_path_factory.mktemp("source") / "repo", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("specserve", *LINKED):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(out)]
    result = subprocess.run([*command, "--disable-pip-version-check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = out.glob("specserve-*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_specserve_is_the_only_top_level_package(wheel_names):
    assert {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name} == {"specserve"}


@pytest.mark.parametrize("folder", LINKED)
def test_the_linked_folders_are_in_the_wheel_as_files(wheel_names, folder):
    expected = {
        f"specserve/{folder}/{path.relative_to(ROOT / folder).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".jinja", ".jsonl")
    }
    assert {name for name in wheel_names if name.startswith(f"specserve/{folder}/")} == expected


def test_the_type_marker_and_the_licence_are_in_the_wheel(wheel_names):
    assert "specserve/py.typed" in wheel_names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)


def test_the_top_folders_are_relative_links_in_the_package():
    for folder in LINKED:
        assert os.readlink(ROOT / "specserve" / folder) == f"../{folder}"


def test_the_top_folders_are_no_packages_of_their_own():
    """transformers probes for a package called `kernels`; with an __init__.py there, ours would answer."""
    for folder in LINKED:
        assert not (ROOT / folder / "__init__.py").exists()


LIGHT = (
    *("specserve", "specserve.config", "specserve.messages", "specserve.settings"),
    *("specserve.server.run", "specserve.schedule.scheduler", "specserve.loadgen.client", "specserve.cli.main"),
)


@pytest.mark.parametrize("module", LIGHT)
def test_importing_does_not_load_the_heavy_libraries(module):
    """Not through what it imports either, which `test_rooms` does not see."""
    heavy = {"torch", "triton", "peft", "transformers"}
    code = f"import sys, {module}; sys.exit(', '.join({heavy!r} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_engines_process_loads_no_path_that_may_not_serve():
    """What a GPU needs is 0.4 s of a start on a CPU."""
    unwanted = {"triton", "peft", "transformers", "specserve.compute.cuda.build", "specserve.server.app"}
    code = f"import sys, specserve.engine.process; sys.exit(', '.join({unwanted!r} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_installed_version_is_the_package_version():
    import tomllib

    from specserve import __version__

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_images_copy_what_the_package_is_built_from():
    """A folder that the wheel needs and an image does not copy would be missed at its first start only."""
    needed = {"Makefile", "pyproject.toml", "README.md", "LICENSE", "specserve", *LINKED}
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    assert let_through == needed
    for name in ("cpu", "cuda"):
        lines = (ROOT / "deploy" / f"Dockerfile.{name}").read_text().splitlines()
        assert {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]} == needed
