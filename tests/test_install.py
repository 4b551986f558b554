"""Installing gives `zerokl.…` and nothing else: above all no top-level module `kernels`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["kernels", "alignment", "weightsync", "orchestrate", "bench"]
PROBE = f"""
import importlib.util, sys
import zerokl, zerokl.kernels
for room in {ROOMS}:
    assert importlib.util.find_spec("zerokl." + room), room
    found = importlib.util.find_spec(room)
    assert found is None, (room, found)
import torch
from zerokl import kernels
x = torch.ones(2, 8).bfloat16()
assert kernels.linear(x, x)[0, 0] == 8
print(zerokl.__file__, zerokl.kernels.__file__)
"""


def run(*command, cwd, **kwargs):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_editable_install(tmp_path):
    """This environment's own editable install, from outside the checkout."""
    assert str(ROOT) in run(sys.executable, "-c", PROBE, cwd=tmp_path)


def test_wheel_in_an_empty_environment(tmp_path):
    """A wheel, in an environment that holds only torch and numpy besides (borrowed: they need no install scripts)."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("zerokl-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    assert sorted(p.name for p in site.iterdir() if not p.name.endswith(".dist-info")) == ["bin", "zerokl"]
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    import numpy
    import torch
    import typing_extensions

    for module in (torch, numpy, typing_extensions):
        path = Path(module.__file__)
        source = path.parent if path.name == "__init__.py" else path
        (borrowed / source.name).symlink_to(source)
    for extra in (
        "numpy.libs",
        "torchgen",
        "sympy",
        "mpmath",
        "filelock",
        "jinja2",
        "markupsafe",
        "networkx",
        "fsspec",
    ):
        source = Path(numpy.__file__).parent.parent / extra
        if source.exists():
            (borrowed / extra).symlink_to(source)
    (site / "borrowed.pth").write_text(str(borrowed))
    assert str(site) in run(python, "-c", PROBE, cwd=tmp_path)


def test_the_checkout_resolves_names_uninstalled():
    """Editors and type checkers find every room through relative links."""
    for room in ROOMS:
        link = ROOT / "zerokl" / room
        assert link.is_symlink()
        assert link.readlink() == Path("..") / room
